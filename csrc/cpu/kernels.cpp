// Compiled once for each instruction set, LUKE_ISA, with its flags (setup.py).
#include "kernels.h"

#include "backward.h"
#include "forward.h"
#include "linear.h"
#include "norm.h"
#include "peak.h"

#define LUKE_JOIN_(a, b) a##b
#define LUKE_JOIN(a, b) LUKE_JOIN_(a, b)

namespace luke_kernels {
namespace LUKE_ISA {
namespace {

// Calls f with what products are made of and the type of the tensors. Instruction sets that only add products of
// bfloat16 have kernels of no other type (isa.cpp).
template <class F>
LUKE_INLINE auto dispatch([[maybe_unused]] DType dtype, const F& f) {
#if defined(__AMX_BF16__)
  const FullTiles tiles;
  return f(Tiles{}, bfloat16{});
#elif defined(__AVX512BF16__)
  return f(Pairs{}, bfloat16{});
#else
  switch (dtype) {
    case DType::kBFloat16:
      return f(Single<Floats>{}, bfloat16{});
    case DType::kFloat16:
      return f(Single<Floats>{}, float16{});
    case DType::kFloat64:
      return f(Single<Doubles>{}, double{});
    default:
      return f(Single<Floats>{}, float{});
  }
#endif
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

// Layers in float64 are nobody's. AMX multiplies float32 too.
template <class F>
LUKE_INLINE auto dispatch_linear(DType dtype, const F& f) {
#if defined(__AMX_BF16__)
  if (dtype == DType::kFloat32) {
    const FullTiles tiles;
    return f(SplitTiles{}, float{});
  }
#endif
  return dispatch(dtype == DType::kFloat64 ? DType::kFloat32 : dtype, [&](auto product, auto scalar) {
    using In = decltype(scalar);
    if constexpr (std::is_same_v<In, double>) {
      return f(Single<Floats>{}, float{});
    } else {
      return f(product, scalar);
    }
  });
}

LinearSizes linear_sizes(DType dtype, const Linear& linear) {
  return dispatch_linear(dtype, [&](auto product, auto scalar) {
    using Block = LinearBlock<decltype(product), decltype(scalar)>;
    constexpr int64_t kWord = sizeof(typename decltype(product)::Word);
    Memory memory(nullptr);
    const Block block(linear, memory);
    return LinearSizes{Block::packed_words(linear.in_size, linear.out_size) * kWord,
                       memory.taken(),
                       Block::are_words(linear) ? 0 : Block::row_words(linear.in_size) * kWord,
                       Block::max_rows(linear.in_size),
                       Block::kRowMultiple,
                       Block::num_panels(linear.out_size)};
  });
}

void linear_pack(DType dtype, const Matrix& weight, int64_t in_size, int64_t out_size, void* packed) {
  dispatch_linear(dtype, [&](auto product, auto scalar) {
    LinearBlock<decltype(product), decltype(scalar)>::pack(weight, in_size, out_size, packed);
  });
}

void linear_pack_rows(DType dtype, const Linear& linear, Span block, Span rows, void* packed) {
  dispatch_linear(dtype, [&](auto product, auto scalar) {
    LinearBlock<decltype(product), decltype(scalar)>::pack_rows_of(linear, block, rows, packed);
  });
}

void linear(DType dtype, const Linear& linear, Span rows, Span panels, const void* packed, void* scratch) {
  dispatch_linear(dtype, [&](auto product, auto scalar) {
    Memory memory(scratch);
    LinearBlock<decltype(product), decltype(scalar)>(linear, memory).run(rows, panels, packed);
  });
}

void layer_norm([[maybe_unused]] DType dtype, const Norm& norm, Span rows) {
#if defined(__AVX512BF16__)
  normalise<bfloat16>(norm, rows);
#else
  dtype == DType::kBFloat16  ? normalise<bfloat16>(norm, rows)
  : dtype == DType::kFloat16 ? normalise<float16>(norm, rows)
                             : normalise<float>(norm, rows);
#endif
}

int64_t multiply_add(DType dtype, int64_t rounds) {
  return dispatch(dtype, [&](auto product, auto) { return run_multiply_adds<decltype(product)>(rounds); });
}

}  // namespace
}  // namespace LUKE_ISA

extern const Kernels LUKE_JOIN(kernels_, LUKE_ISA) = {LUKE_ISA::forward_scratch_bytes, LUKE_ISA::forward,
                                                      LUKE_ISA::backward_scratch_bytes, LUKE_ISA::backward,
                                                      LUKE_ISA::linear_sizes, LUKE_ISA::linear_pack,
                                                      LUKE_ISA::linear_pack_rows, LUKE_ISA::linear,
                                                      LUKE_ISA::layer_norm,
                                                      LUKE_ISA::multiply_add};

}  // namespace luke_kernels
