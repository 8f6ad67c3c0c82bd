// The kernels of one dtype and head_dim, LUKE_DTYPE and LUKE_HEAD_DIM: compiled once for each.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace luke_kernels::cuda {

namespace {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1) attention(const __grid_constant__ Arguments args) {
  // On Hopper, where there are two of a kernel, only that of warpgroups is compiled; elsewhere only the other.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kBuilt = Kernel::kWarpgroups || !Kernel::kHasWarpgroups;
#else
  constexpr bool kBuilt = !Kernel::kWarpgroups;
#endif
  if constexpr (kBuilt) {
    Kernel(args).run();
  } else {
    __trap();
  }
}

bool has_warpgroups(int device) {
#ifdef LUKE_HOPPER
  int major = 0, minor = 0;
  const bool known = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  if (!known) cudaGetLastError();
  return known && major == 9 && minor == 0;
#else
  (void)device;
  return false;
#endif
}

// Switches to a device for a while.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && device != before_) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (error == cudaSuccess && device_ != before_) cudaSetDevice(before_);
  }

  cudaError_t error;

 private:
  int before_ = 0, device_;
};

std::string described(const AttentionParams& op) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  return "batch_size " + text(op.batch_size) + ", max_words " + text(op.segments[kWord].max_length) + ", max_entities " +
         text(op.segments[kEntity].max_length) + ", num_heads " + text(op.num_heads) + ", head_dim " + text(op.head_dim);
}

struct Launch {
  const char* name;

  void check(cudaError_t error, const char* what, const AttentionParams& op) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // which the next launch would find
    throw std::runtime_error(std::string("the CUDA kernel of ") + name + " must run, got " + cudaGetErrorString(error) +
                             " from " + what + " (" + described(op) + ")");
  }

  template <class Kernel>
  void operator()(const Arguments& args) const {
    const AttentionParams& op = args.op;
    const int64_t grid = args.blocks * op.num_heads * op.batch_size;
    if (grid > 0x7fffffff) throw std::invalid_argument("a batch must be of fewer than 2^31 blocks, got " + described(op));
    if (grid == 0) return;
    const OnDevice on(op.device);
    check(on.error, "cudaSetDevice", op);
    const auto kernel = attention<Kernel>;
    // Beyond 48 KiB a kernel must ask; again and again, since each device must be asked and the call is short.
    if (Kernel::kSharedBytes > 48 * 1024) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes),
            "cudaFuncSetAttribute", op);
    }
    kernel<<<static_cast<unsigned>(grid), Kernel::kThreads, Kernel::kSharedBytes,
             static_cast<cudaStream_t>(op.stream)>>>(args);
    check(cudaGetLastError(), "its launch", op);
  }
};

}  // namespace

template <DType T, int kHeadDim>
void run_forward(const AttentionParams& op) {
  const Launch launch{"the forward"};
  forward<T, kHeadDim>(op, has_warpgroups(op.device), launch);
}

template <DType T, int kHeadDim>
void run_backward(const AttentionParams& op) {
  const Launch launch{"the backward"};
  backward<T, kHeadDim>(op, has_warpgroups(op.device), launch);
}

template void run_forward<DType::LUKE_DTYPE, LUKE_HEAD_DIM>(const AttentionParams&);
template void run_backward<DType::LUKE_DTYPE, LUKE_HEAD_DIM>(const AttentionParams&);

}  // namespace luke_kernels::cuda
