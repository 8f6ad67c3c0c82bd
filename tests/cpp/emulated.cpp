// The CUDA kernels on a CPU, as the extension would call them on a GPU. With csrc's bindings it makes a luke_kernels._C
// whose cuda backend takes tensors of the CPU.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../../csrc/linear.h"
#include "../../csrc/cuda/dispatch.h"

namespace luke_kernels {

namespace {

// LUKE_EMULATOR_ORDER holds "last" or "first", "at once" or "late", and perhaps "warpgroups", for the kernels of Hopper.
cuda::emulator::Order order() {
  const char* given = std::getenv("LUKE_EMULATOR_ORDER");
  const std::string text = given ? given : "";
  cuda::emulator::Order order;
  order.last_warp_first = text.find("last") != std::string::npos;
  order.copies_land_at_once = text.find("at once") != std::string::npos;
  order.warpgroups = text.find("warpgroups") != std::string::npos;
  return order;
}

struct Emulate {
  template <class Kernel>
  void operator()(const cuda::Arguments& args) const {
    const int64_t grid = args.blocks * args.op.num_heads * args.op.batch_size;
    const int64_t conflicts = cuda::emulator::run_grid(grid, Kernel::kThreads, Kernel::kSharedBytes, order(),
                                                       [&args] { Kernel(args).run(); });
    if (conflicts) cuda::emulator::fail("lanes of an ldmatrix meet in a bank");
  }
};

}  // namespace

// The bindings know of these too.
bool has_openmp() { return false; }
const char* cpu_isa() { return "none"; }
void set_cpu_isa(const char*) {}
size_t attention_scratch_bytes_cpu(const AttentionParams&) { return 0; }
void attention_forward_cpu(const AttentionParams&) { throw std::logic_error("only CUDA is emulated"); }
void attention_backward_cpu(const AttentionParams&) { throw std::logic_error("only CUDA is emulated"); }
size_t linear_packed_bytes_cpu(DType, int64_t, int64_t) { return 0; }
void linear_pack_cpu(DType, const void*, int64_t, int64_t, int64_t, void*) {
  throw std::logic_error("only CUDA is emulated");
}
void linear_cpu(const LinearParams&) { throw std::logic_error("only CUDA is emulated"); }
void layer_norm_cpu(const NormParams&) { throw std::logic_error("only CUDA is emulated"); }
int64_t multiply_add_cpu(DType, int, int64_t) { throw std::logic_error("only CUDA is emulated"); }

std::string cuda_missing(int) { return ""; }
const char* cuda_architectures() { return "emulated"; }

namespace cuda {

template <DType T, int kHeadDim>
void run_forward(const AttentionParams& op) {
  forward<T, kHeadDim>(op, order().warpgroups, Emulate());
}

template <DType T, int kHeadDim>
void run_backward(const AttentionParams& op) {
  backward<T, kHeadDim>(op, order().warpgroups, Emulate());
}

#define LUKE_INSTANTIATE(T, D)                                      \
  template void run_forward<DType::T, D>(const AttentionParams&);  \
  template void run_backward<DType::T, D>(const AttentionParams&);
#define LUKE_INSTANTIATE_ALL(T) LUKE_INSTANTIATE(T, 32) LUKE_INSTANTIATE(T, 64) LUKE_INSTANTIATE(T, 128)
LUKE_INSTANTIATE_ALL(kFloat32)
LUKE_INSTANTIATE_ALL(kBFloat16)
LUKE_INSTANTIATE_ALL(kFloat16)

}  // namespace cuda
}  // namespace luke_kernels
