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
  cudaDeviceProp properties;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && (device < 0 || device >= count)) return "there is no GPU " + std::to_string(device);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // which later calls would find
    return cudaGetErrorString(error);
  }
  const std::string name = std::string(properties.name) + " (sm_" + std::to_string(properties.major) +
                           std::to_string(properties.minor) + ")";
  if (properties.major < 8) return "needs compute capability 8.0 or later, got " + name;
  error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, probe);
    cudaSetDevice(before);
  }
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return std::string("built for ") + LUKE_CUDA_ARCHITECTURES + ", got " + name + ": " + cudaGetErrorString(error);
}

}  // namespace luke_kernels
