// How a head is cut: panels and blocks of keys, the kinds of a range of rows; and memory for both directions.
#pragma once

#include "pack.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace luke_kernels::LUKE_ISA {

// Hands out memory in lines of a cache, or only counts it where there is none.
class Memory {
 public:
  explicit Memory(void* memory) : begin_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* place = begin_ ? reinterpret_cast<T*>(begin_ + taken_) : nullptr;
    const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    taken_ += bytes;
#if defined(__SANITIZE_ADDRESS__)
    // A line that nobody may touch, so that AddressSanitizer sees one area run into the next.
    if (begin_) {
      ASAN_UNPOISON_MEMORY_REGION(place, bytes);
      ASAN_POISON_MEMORY_REGION(begin_ + taken_, 64);
    }
    taken_ += 64;
#endif
    return place;
  }
  int64_t taken() const { return taken_; }

 private:
  char* begin_;
  int64_t taken_ = 0;
};

// Keys of one kind that make a panel of operand B. A slot is a place among the columns of a block of scores: panels
// begin at multiples of kLanes.
struct KeyPanel {
  int64_t kind;
  int64_t rank;  // of the first key among its kind
  int64_t count;
  int64_t slot;
};

// How many slots a block of keys has room for, so that keys, values and scores stay in the second cache.
template <class M>
constexpr int64_t key_capacity(int64_t head_dim) {
  const int64_t slots = 49152 / round_up(head_dim, M::kLanes);
  return round_up(slots < 256 ? 256 : slots > 1024 ? 1024 : slots, kPanel<M>) + 2 * kPanel<M>;
}

// Walks over keys of a sequence in blocks of equal size, whole panels each.
template <class M>
class KeyBlocks {
 public:
  KeyBlocks(const Head& head, int64_t capacity, Span keys) {
    const int64_t words = head.tokens[0].size;
    keys_[0] = {smaller(keys.begin, words), smaller(keys.end, words)};
    keys_[1] = {larger(keys.begin, words) - words, larger(keys.end, words) - words};
    int64_t slots = 0;
    for (const Span& span : keys_) slots += round_up(span.end - span.begin, M::kLanes);
    const int64_t most = capacity - kPanel<M>, blocks = (slots + most - 1) / most;
    target_ = blocks ? (slots + blocks - 1) / blocks : 0;
    rank_ = keys_[0].begin;
  }

  bool next() {
    num_panels = slots = 0;
    ranks[0] = ranks[1] = {};
    while (slots < target_ && kind_ < 2) {
      const int64_t count = smaller(kPanel<M>, keys_[kind_].end - rank_);
      if (count <= 0) {
        if (++kind_ < 2) rank_ = keys_[kind_].begin;
        continue;
      }
      panels[num_panels++] = {kind_, rank_, count, slots};
      ranks[kind_] = {ranks[kind_].end ? ranks[kind_].begin : rank_, rank_ + count};
      rank_ += count;
      slots += round_up(count, M::kLanes);
    }
    return num_panels > 0;
  }

  KeyPanel panels[1024 / kPanel<M> + 4];
  Span ranks[2];  // of the block's keys among their kinds
  int64_t num_panels = 0;
  int64_t slots = 0;

 private:
  Span keys_[2];  // of each kind
  int64_t target_;
  int64_t kind_ = 0;
  int64_t rank_;
};

// Fetches rows that will be packed soon, a few at a time: a head's rows lie far apart, so that the machine does not
// foresee them, and all at once they would have to be waited for.
class Ahead {
 public:
  void clear() { num_ranges_ = range_ = rows_ = 0; }

  template <typename In>
  void add(const Matrix& matrix, Span rows, int64_t numbers) {
    if (rows.begin >= rows.end) return;
    ranges_[num_ranges_++] = {reinterpret_cast<const char*>(row_of<In>(matrix, rows.begin)),
                              matrix.stride * static_cast<int64_t>(sizeof(In)), rows.end - rows.begin,
                              numbers * static_cast<int64_t>(sizeof(In))};
    rows_ += rows.end - rows.begin;
  }

  // All in as many calls of advance().
  void spread(int64_t steps) { step_ = (rows_ + steps - 1) / steps; }

  LUKE_INLINE void advance() {
    for (int64_t i = 0; i < step_ && range_ < num_ranges_; ++i) {
      Range& range = ranges_[range_];
      for (int64_t byte = 0; byte < range.bytes; byte += 64) __builtin_prefetch(range.row + byte);
      range.row += range.stride;
      if (--range.left == 0) ++range_;
    }
  }

 private:
  struct Range {
    const char* row;
    int64_t stride, left, bytes;
  };
  Range ranges_[10];  // two queries, keys, values and outputs, of both kinds
  int64_t num_ranges_ = 0, range_ = 0, rows_ = 0, step_ = 0;
};

// Calls f(tokens, kind, rank, count, place) for the words and the entities among rows: `count` of them from `rank` on,
// which lie at `place` in the range.
template <class F>
LUKE_INLINE void for_each_kind(const Head& head, Span rows, const F& f) {
  const int64_t words = head.tokens[0].size;
  if (rows.begin < words) f(head.tokens[0], 0, rows.begin, smaller(rows.end, words) - rows.begin, 0);
  if (rows.end > words) {
    const int64_t first = larger(rows.begin, words);
    f(head.tokens[1], 1, first - words, rows.end - first, first - rows.begin);
  }
}

}  // namespace luke_kernels::LUKE_ISA
