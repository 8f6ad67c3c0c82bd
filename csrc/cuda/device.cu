// Whether the kernels can run on a device.
#include <cuda_runtime.h>

#include <string>

#include "../attention.h"

namespace luke_kernels {

namespace {

// Compiled for the same architectures as the kernels.
__global__ void probe() {}

}  // namespace

const char* cuda_architectures() { return LUKE_CUDA_ARCHITECTURES; }

std::string cuda_missing(int device) {
  int count = 0, before = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) return cudaGetErrorString(error);
  if (device < 0 || device >= count) return "there is no GPU " + std::to_string(device);
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  const std::string name = std::string(properties.name) + " (sm_" + std::to_string(properties.major) +
                           std::to_string(properties.minor) + ")";
  if (properties.major < 8) return "needs compute capability 8.0 or later, got " + name;
  cudaGetDevice(&before);
  cudaSetDevice(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  cudaSetDevice(before);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // what later calls would find
  return std::string("built for ") + LUKE_CUDA_ARCHITECTURES + ", got " + name + ": " + cudaGetErrorString(error);
}

}  // namespace luke_kernels
