// Compiled once for each instruction set, LUKE_ISA, with its flags (setup.py).
#include "kernels.h"

#include "backward.h"
#include "forward.h"
#include "peak.h"

#define LUKE_JOIN_(a, b) a##b
#define LUKE_JOIN(a, b) LUKE_JOIN_(a, b)

namespace luke_kernels {
namespace LUKE_ISA {
namespace {

// Calls f with what products are made of and the type of the tensors.
template <class F>
LUKE_INLINE auto dispatch(DType dtype, const F& f) {
  switch (dtype) {
#if defined(__AVX512BF16__)
    case DType::kBFloat16:
      return f(Pairs{}, bfloat16{});
#else
    case DType::kBFloat16:
      return f(Single<Floats>{}, bfloat16{});
#endif
    case DType::kFloat16:
      return f(Single<Floats>{}, float16{});
    case DType::kFloat64:
      return f(Single<Doubles>{}, double{});
    default:
      return f(Single<Floats>{}, float{});
  }
}

int64_t forward_scratch_bytes(DType dtype, int64_t head_dim) {
  return dispatch(dtype, [&](auto product, auto scalar) {
    Memory memory(nullptr);
    const Forward<decltype(product), decltype(scalar)> forward(head_dim, memory);
    return memory.taken();
  });
}

void forward(DType dtype, const Part& part, const Part* next, void* scratch) {
  dispatch(dtype, [&](auto product, auto scalar) {
    Memory memory(scratch);
    Forward<decltype(product), decltype(scalar)>(part.head.head_dim, memory).run(part, next);
  });
}

int64_t backward_scratch_bytes(DType dtype, int64_t head_dim, int64_t rows) {
  return dispatch(dtype, [&](auto product, auto scalar) {
    Memory memory(nullptr);
    const Backward<decltype(product), decltype(scalar)> backward(head_dim, rows, memory);
    return memory.taken();
  });
}

void backward(DType dtype, const Head& head, Span keys, Span rows, Gradients gradients, void* scratch) {
  dispatch(dtype, [&](auto product, auto scalar) {
    Memory memory(scratch);
    Backward<decltype(product), decltype(scalar)>(head.head_dim, all_rows(head).end, memory)
        .run(head, keys, rows, gradients);
  });
}

int64_t multiply_add(DType dtype, int64_t rounds) {
  return dispatch(dtype, [&](auto product, auto) { return run_multiply_adds<decltype(product)>(rounds); });
}

}  // namespace
}  // namespace LUKE_ISA

extern const Kernels LUKE_JOIN(kernels_, LUKE_ISA) = {LUKE_ISA::forward_scratch_bytes, LUKE_ISA::forward,
                                                      LUKE_ISA::backward_scratch_bytes, LUKE_ISA::backward,
                                                      LUKE_ISA::multiply_add};

}  // namespace luke_kernels
