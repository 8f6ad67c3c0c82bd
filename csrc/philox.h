// The dropout mask as a function of logical positions: Philox-4x32-10. The rule stands in luke_kernels/ops/dropout.py.
#pragma once

#include <algorithm>
#include <cstdint>

namespace luke_kernels {

struct Philox4x32 {
  uint32_t values[4];
};

inline Philox4x32 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// Which elements of one (sequence, head) and pair of kinds are kept.
struct DropoutMask {
  uint64_t seed;
  uint32_t stream;  // head + num_heads * sequence
  uint32_t last;    // low half of the offset, with the two kinds in its highest bits
  uint32_t threshold;

  DropoutMask(uint64_t seed, uint64_t offset, double dropout_p, uint32_t stream, bool row_is_entity,
              bool column_is_entity)
      : seed(seed),
        stream(stream),
        last(static_cast<uint32_t>(offset) ^ (uint32_t{row_is_entity} << 31) ^ (uint32_t{column_is_entity} << 30)),
        threshold(static_cast<uint32_t>(dropout_p * 4294967296.0)) {}

  // Draws four columns at a time: the whole row of n columns from `column`, a multiple of four, on.
  template <typename Apply>
  void for_each(uint32_t row, uint32_t column, int64_t n, Apply apply) const {
    for (int64_t j = 0; j < n; j += 4) {
      const Philox4x32 draw = philox((column + static_cast<uint32_t>(j)) / 4, row, stream, last, seed);
      for (int64_t lane = 0; lane < std::min<int64_t>(4, n - j); ++lane) {
        apply(j + lane, draw.values[lane] >= threshold);
      }
    }
  }
};

}  // namespace luke_kernels
