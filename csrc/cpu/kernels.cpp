// Compiled once for each instruction set, LUKE_ISA, with its flags (setup.py).
#include "kernels.h"

#include "backward.h"
#include "forward.h"
#include "linear.h"
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

// Layers in float64 are nobody's.
template <class F>
LUKE_INLINE auto dispatch_linear(DType dtype, const F& f) {
  return dispatch(dtype == DType::kFloat64 ? DType::kFloat32 : dtype, [&](auto product, auto scalar) {
    using In = decltype(scalar);
    if constexpr (std::is_same_v<In, double>) {
      return f(Single<Floats>{}, float{});
    } else {
      return f(product, scalar);
    }
  });
}

LinearSizes linear_sizes(DType dtype, int64_t in_size, int64_t out_size) {
  return dispatch_linear(dtype, [&](auto product, auto scalar) {
    using Block = LinearBlock<decltype(product), decltype(scalar)>;
    using Word = typename decltype(product)::Word;
    Memory memory(nullptr);
    Linear linear{};
    linear.in_size = in_size;
    const Block block(linear, memory);
    return LinearSizes{Block::packed_words(in_size, out_size) * static_cast<int64_t>(sizeof(Word)), memory.taken(),
                       Block::max_rows(in_size), Block::num_panels(out_size)};
  });
}

void linear_pack(DType dtype, const Matrix& weight, int64_t in_size, int64_t out_size, void* packed) {
  dispatch_linear(dtype, [&](auto product, auto scalar) {
    LinearBlock<decltype(product), decltype(scalar)>::pack(weight, in_size, out_size, packed);
  });
}

void linear(DType dtype, const Linear& linear, Span rows, Span panels, void* scratch) {
  dispatch_linear(dtype, [&](auto product, auto scalar) {
    Memory memory(scratch);
    LinearBlock<decltype(product), decltype(scalar)>(linear, memory).run(rows, panels);
  });
}

int64_t multiply_add(DType dtype, int64_t rounds) {
  return dispatch(dtype, [&](auto product, auto) { return run_multiply_adds<decltype(product)>(rounds); });
}

}  // namespace
}  // namespace LUKE_ISA

extern const Kernels LUKE_JOIN(kernels_, LUKE_ISA) = {LUKE_ISA::forward_scratch_bytes, LUKE_ISA::forward,
                                                      LUKE_ISA::backward_scratch_bytes, LUKE_ISA::backward,
                                                      LUKE_ISA::linear_sizes, LUKE_ISA::linear_pack, LUKE_ISA::linear,
                                                      LUKE_ISA::multiply_add};

}  // namespace luke_kernels
