// The machine of csrc/cuda/machine.h on a CPU: a fiber a thread, and instructions of a warp computed lane by lane when the
// last of its lanes has come. Shared memory begins as NaN; copies land only when they are waited for, or at once.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "../../csrc/dtype.h"

#define LUKE_DEVICE inline
#define LUKE_BOTH inline
#define LUKE_UNROLL
#define LUKE_LOOP
#define LUKE_UNROLL_BY(n)

namespace luke_kernels::cuda {

using Shared = uint32_t;

namespace emulator {

// How a grid runs: whether the first or the last warp goes ahead as far as it can, and when copies land.
struct Order {
  bool last_warp_first = false;
  bool copies_land_at_once = false;
  bool warpgroups = false;  // whose kernels run
};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 1 << 18;

struct Copy {
  Shared to;
  const void* from;
  int bytes;
  bool exists;
};

struct Fiber {
  ucontext_t start;
  jmp_buf where;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool begun = false, done = false;
  std::vector<std::vector<Copy>> groups;  // the last is open
  std::vector<Shared> unfenced;           // where copies landed that products of warpgroups may not see yet
};

// What lanes bring to an instruction of their warp, and take from it.
struct Lane {
  const char* instruction;
  uint32_t in[8];
  float sums[64];
  uint32_t out[4];
};

struct Block {
  Order order;
  int index = 0, threads = 0;
  std::vector<char> shared;
  std::vector<int> unfenced;  // copies of each 16 bytes that no fence has followed
  std::vector<Fiber> fibers;
  std::vector<Lane> lanes;
  std::vector<uint32_t> runnable;  // a warp's lanes, as bits
  std::vector<int> arrived, arrived_together;  // a warp's lanes at an instruction; a warpgroup's, by its first warp
  int at_barrier = 0, running = 0, current = 0;
  std::function<void()> body;
  jmp_buf scheduler;
  int64_t bank_conflicts = 0;
};

inline Block*& block() {
  static Block* current = nullptr;
  return current;
}

inline void begin() {
  Block& b = *block();
  b.body();
  b.fibers[b.current].done = true;
  --b.running;
  b.runnable[b.current / kLanes] &= ~(1u << b.current % kLanes);
  _longjmp(b.scheduler, 1);
}

// Leaves the current fiber until it may run again.
inline void wait() {
  Block& b = *block();
  b.runnable[b.current / kLanes] &= ~(1u << b.current % kLanes);
  if (_setjmp(b.fibers[b.current].where) == 0) _longjmp(b.scheduler, 1);
}

inline void run_block(Block& b) {
  block() = &b;
  const int warps = b.threads / kLanes;
  b.runnable.assign(warps, 0xffffffffu);
  b.arrived.assign(warps, 0);
  b.arrived_together.assign(warps, 0);
  b.lanes.assign(b.threads, Lane{});
  b.fibers.resize(b.threads);
  for (Fiber& fiber : b.fibers) {
    fiber.begun = fiber.done = false;
    fiber.unfenced.clear();
    fiber.groups.assign(1, {});
  }
  b.running = b.threads;
  b.at_barrier = 0;
  while (b.running > 0) {
    int chosen = -1;
    for (int i = 0; i < warps && chosen < 0; ++i) {
      const int warp = b.order.last_warp_first ? warps - 1 - i : i;
      if (b.runnable[warp]) chosen = warp * kLanes + __builtin_ctz(b.runnable[warp]);
    }
    if (chosen < 0) fail("all threads wait: some went another way");
    b.current = chosen;
    if (_setjmp(b.scheduler) == 0) {
      Fiber& fiber = b.fibers[chosen];
      if (fiber.begun) _longjmp(fiber.where, 1);
      fiber.begun = true;
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.data();
      fiber.start.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.start, begin, 0);
      setcontext(&fiber.start);
    }
  }
}

// Runs body in each thread of each block of a grid. Returns how often lanes of an ldmatrix met in a bank.
inline int64_t run_grid(int64_t blocks, int threads, int shared_bytes, Order order, std::function<void()> body) {
  Block b;
  b.order = order;
  b.threads = threads;
  b.body = std::move(body);
  for (int64_t i = 0; i < blocks; ++i) {
    b.index = static_cast<int>(i);
    b.shared.assign(shared_bytes, static_cast<char>(0xff));
    b.unfenced.assign(shared_bytes / 16 + 1, 0);
    run_block(b);
  }
  return b.bank_conflicts;
}

// Meets the other lanes of the warp, or of kWarps of them, at an instruction; the last to come computes it for all.
template <int kWarps = 1, class Compute>
const Lane& meet(const char* instruction, const Lane& brought, Compute compute) {
  Block& b = *block();
  const int first = b.current / kLanes / kWarps * kWarps, me = b.current;
  Lane* lanes = b.lanes.data() + first * kLanes;
  b.lanes[me] = brought;
  b.lanes[me].instruction = instruction;
  int& arrived = (kWarps == 1 ? b.arrived : b.arrived_together)[first];
  if (++arrived < kWarps * kLanes) {
    wait();
  } else {
    for (int i = 0; i < kWarps * kLanes; ++i) {
      if (std::strcmp(lanes[i].instruction, instruction) != 0) fail("lanes meet at different instructions");
    }
    compute(lanes);
    arrived = 0;
    for (int warp = first; warp < first + kWarps; ++warp) b.runnable[warp] = 0xffffffffu;
  }
  return b.lanes[me];
}

template <class V>
V& at(Shared address) {
  Block& b = *block();
  if (address % sizeof(V) != 0) fail("an address in shared memory is not aligned");
  if (address + sizeof(V) > b.shared.size()) fail("an address lies outside shared memory");
  return *reinterpret_cast<V*>(b.shared.data() + address);
}

inline void land(const Copy& copy) {
  Block& b = *block();
  if (copy.to % copy.bytes != 0 || copy.to + copy.bytes > b.shared.size()) fail("a copy goes to no place of its size");
  if (reinterpret_cast<uintptr_t>(copy.from) % copy.bytes != 0) fail("a copy comes from an address that is not aligned");
  if (copy.exists) std::memcpy(b.shared.data() + copy.to, copy.from, copy.bytes);
  else std::memset(b.shared.data() + copy.to, 0, copy.bytes);
}

inline float from_bits(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint32_t to_bits(float value) {
  uint32_t out;
  std::memcpy(&out, &value, 4);
  return out;
}

struct Matrices {
  uint16_t m[4][8][8];
};

inline Matrices read_matrices(const Lane* lanes) {
  Matrices out;
  for (int i = 0; i < 4; ++i) {
    uint32_t banks = 0;
    for (int row = 0; row < 8; ++row) {
      const Shared address = lanes[8 * i + row].in[0];
      if (address % 16 != 0) fail("a row of ldmatrix is not aligned");
      std::memcpy(out.m[i][row], &at<std::array<uint16_t, 8>>(address), 16);
      banks |= 1u << address / 16 % 8;
    }
    block()->bank_conflicts += 8 - __builtin_popcount(banks);
  }
  return out;
}

}  // namespace emulator

inline uint32_t thread_index() { return emulator::block()->current; }
inline int block_index() { return emulator::block()->index; }
inline Shared shared_memory() { return 0; }

inline void synchronize() {
  emulator::Block& b = *emulator::block();
  if (++b.at_barrier < b.running) return emulator::wait();
  b.at_barrier = 0;
  for (int i = 0; i < b.threads; ++i) {
    if (!b.fibers[i].done) b.runnable[i / emulator::kLanes] |= 1u << i % emulator::kLanes;
  }
}

template <class V>
V exchange(V value, int mask) {
  emulator::Lane lane{};
  std::memcpy(lane.in, &value, 4);
  const auto& result = emulator::meet("shfl.bfly", lane, [mask](emulator::Lane* lanes) {
    for (int i = 0; i < emulator::kLanes; ++i) lanes[i].out[0] = lanes[i ^ mask].in[0];
  });
  std::memcpy(&value, result.out, 4);
  return value;
}

inline float from_lane(float value, int source) {
  emulator::Lane lane{};
  lane.in[0] = emulator::to_bits(value);
  lane.in[1] = source;
  const auto& result = emulator::meet("shfl.idx", lane, [](emulator::Lane* lanes) {
    for (int i = 0; i < emulator::kLanes; ++i) lanes[i].out[0] = lanes[lanes[i].in[1]].in[0];
  });
  return emulator::from_bits(result.out[0]);
}

template <int kBytes>
void copy_async(Shared to, const void* from, bool exists) {
  emulator::Block& b = *emulator::block();
  const emulator::Copy copy{to, from, kBytes, exists};
  if (b.order.copies_land_at_once) emulator::land(copy);
  else b.fibers[b.current].groups.back().push_back(copy);
}

inline void commit_copies() {
  emulator::Block& b = *emulator::block();
  b.fibers[b.current].groups.emplace_back();
}

template <int kPending>
void wait_copies() {
  emulator::Block& b = *emulator::block();
  auto& groups = b.fibers[b.current].groups;
  while (groups.size() > kPending + 1) {
    for (const emulator::Copy& copy : groups.front()) {
      emulator::land(copy);
      ++b.unfenced[copy.to / 16];
      b.fibers[b.current].unfenced.push_back(copy.to);
    }
    groups.erase(groups.begin());
  }
}

struct Words {
  uint32_t w[4];
};

inline Words load_matrices(Shared row) {
  emulator::Lane lane{};
  lane.in[0] = row;
  const auto& result = emulator::meet("ldmatrix", lane, [](emulator::Lane* lanes) {
    const emulator::Matrices matrices = emulator::read_matrices(lanes);
    for (int l = 0; l < emulator::kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        const auto& pair = &matrices.m[i][l / 4][2 * (l % 4)];
        lanes[l].out[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
  });
  return {{result.out[0], result.out[1], result.out[2], result.out[3]}};
}

inline Words load_matrices_transposed(Shared row) {
  emulator::Lane lane{};
  lane.in[0] = row;
  const auto& result = emulator::meet("ldmatrix.trans", lane, [](emulator::Lane* lanes) {
    const emulator::Matrices matrices = emulator::read_matrices(lanes);
    for (int l = 0; l < emulator::kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        const auto& m = matrices.m[i];
        lanes[l].out[i] = m[2 * (l % 4)][l / 4] | static_cast<uint32_t>(m[2 * (l % 4) + 1][l / 4]) << 16;
      }
    }
  });
  return {{result.out[0], result.out[1], result.out[2], result.out[3]}};
}

template <DType T>
float unpack(uint32_t bits) {
  if constexpr (T == DType::kBFloat16) {
    return emulator::from_bits(bits << 16);
  } else {
    _Float16 half;
    const uint16_t low = static_cast<uint16_t>(bits);
    std::memcpy(&half, &low, 2);
    return static_cast<float>(half);
  }
}

template <DType T>
uint32_t round_half(float value) {
  if constexpr (T == DType::kBFloat16) {
    const uint32_t bits = emulator::to_bits(value);
    if (std::isnan(value)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  } else {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t out;
    std::memcpy(&out, &half, 2);
    return out;
  }
}

template <DType T>
uint32_t pack(float low, float high) {
  return round_half<T>(low) | round_half<T>(high) << 16;
}

template <DType T>
void multiply_add(float (&c)[4], const Words& a, uint32_t b0, uint32_t b1) {
  emulator::Lane lane{};
  for (int i = 0; i < 4; ++i) {
    lane.in[i] = a.w[i];
    lane.sums[i] = c[i];
  }
  lane.in[4] = b0;
  lane.in[5] = b1;
  const auto& result = emulator::meet("mma", lane, [](emulator::Lane* lanes) {
    float left[16][16], right[8][16];
    for (int l = 0; l < emulator::kLanes; ++l) {
      const int g = l / 4, t = l % 4;
      for (int high = 0; high < 2; ++high) {
        for (int i = 0; i < 4; ++i) left[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + high] = unpack<T>(lanes[l].in[i] >> 16 * high);
        for (int i = 0; i < 2; ++i) right[g][2 * t + 8 * i + high] = unpack<T>(lanes[l].in[4 + i] >> 16 * high);
      }
    }
    for (int l = 0; l < emulator::kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        double sum = lanes[l].sums[i];
        const float *x = left[l / 4 + 8 * (i / 2)], *y = right[2 * (l % 4) + i % 2];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(x[k]) * y[k];
        lanes[l].sums[i] = static_cast<float>(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) c[i] = result.sums[i];
}

inline void fence_copies() {
  emulator::Block& b = *emulator::block();
  for (const Shared address : b.fibers[b.current].unfenced) --b.unfenced[address / 16];
  b.fibers[b.current].unfenced.clear();
}

template <class Sums, class Factors>
void warpgroup_begin(Sums&, const Factors&) {}
template <class Sums, class Factors>
void warpgroup_end(Sums&, const Factors&) {}

template <DType T, bool kTransposed, int kN>
void warpgroup_multiply_add(float (&c)[kN][4], const Words& a, uint64_t b) {
  emulator::Lane lane{};
  std::memcpy(lane.in, a.w, sizeof(a.w));
  std::memcpy(lane.in + 4, &b, sizeof(b));
  std::memcpy(lane.sums, c, sizeof(c));
  const auto& result = emulator::meet<4>("wgmma", lane, [b](emulator::Lane* lanes) {
    for (int l = 0; l < 4 * emulator::kLanes; ++l) {
      if (std::memcmp(lanes[l].in + 4, &b, sizeof(b)) != 0) emulator::fail("lanes describe different right factors");
    }
    const uint32_t start = b % (1 << 14) * 16, eight_rows = (b >> 32 & 0x3fff) * 16, mode = b >> 62;
    if (mode != 1 && mode != 2) emulator::fail("a descriptor names another swizzle than of 128 or 64 bytes");
    const uint32_t pitch = mode == 1 ? 128 : 64;
    float right[8 * kN][16];
    for (uint32_t n = 0; n < 8 * kN; ++n) {
      for (uint32_t k = 0; k < 16; ++k) {
        const uint32_t row = kTransposed ? k : n, column = kTransposed ? n : k;
        if (2 * column >= pitch) emulator::fail("a right factor is wider than its swizzle");
        uint32_t address = start + row / 8 * eight_rows + row % 8 * pitch + 2 * column;
        address ^= (address >> 7 & (mode == 1 ? 7 : 3)) << 4;
        if (emulator::block()->unfenced[address / 16]) emulator::fail("wgmma reads a copy before a fence");
        right[n][k] = unpack<T>(emulator::at<uint16_t>(address));
      }
    }
    for (int l = 0; l < 4 * emulator::kLanes; ++l) {
      const emulator::Lane* quad = lanes + l / 4 * 4;
      float left[2][16];
      for (int t = 0; t < 4; ++t) {
        for (int i = 0; i < 4; ++i) {
          for (int high = 0; high < 2; ++high) {
            left[i % 2][2 * t + 8 * (i / 2) + high] = unpack<T>(quad[t].in[i] >> 16 * high);
          }
        }
      }
      for (int i = 0; i < 4 * kN; ++i) {
        double sum = lanes[l].sums[i];
        const float *x = left[i / 2 % 2], *y = right[i / 4 * 8 + 2 * (l % 4) + i % 2];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(x[k]) * y[k];
        lanes[l].sums[i] = static_cast<float>(sum);
      }
    }
  });
  std::memcpy(c, result.sums, sizeof(c));
}

struct alignas(16) Floats {
  float f[4];
};

struct alignas(8) Pair {
  float f[2];
};

inline Floats load_floats(Shared from) { return emulator::at<Floats>(from); }
inline Pair load_pair(Shared from) { return emulator::at<Pair>(from); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float exp2_of(float x) { return std::exp2(x); }
inline float log2_of(float x) { return std::log2(x); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float infinity() { return INFINITY; }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }

}  // namespace luke_kernels::cuda
