// Unit tests of what the CUDA kernels are made of, in the emulator: places, fragments, products, draws. With --table it
// prints what each kernel asks of a multiprocessor instead.
#include <cmath>
#include <random>
#include <set>
#include <tuple>

#include "../../csrc/cuda/dispatch.h"

using namespace luke_kernels;
using namespace luke_kernels::cuda;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

template <DType T, int D>
void test_places() {
  using Places = Tile<T, D, 32>;
  std::set<uint32_t> places;
  for (int row = 0; row < 32; ++row) {
    for (int chunk = 0; chunk < Places::kChunks; ++chunk) places.insert(Places::place(row, chunk));
  }
  expect(places.size() == 32u * Places::kChunks, "chunks have places of their own");
  expect(*places.rbegin() == Places::kBytes - 16u && Places::kBytes == 32 * D * kElementBytes<T>, "chunks fill their tile");
  for (int first = 0; first < 32; first += 8) {
    for (int chunk = 0; chunk < Places::kChunks; ++chunk) {
      std::set<uint32_t> banks;
      for (int row = first; row < first + 8; ++row) banks.insert(Places::place(row, chunk) / 16 % 8);
      expect(banks.size() == 8, "equal chunks of eight rows lie in different banks");
    }
  }
}

// Small whole numbers, so that every product is exact in every dtype.
template <DType T>
struct Numbers {
  std::mt19937 random{5};

  float draw() { return static_cast<float>(static_cast<int>(random() % 17) - 8); }

  template <int D, int kRows>
  void put(char* tile, int row, int column, float value) const {
    constexpr int kPerChunk = 16 / kElementBytes<T>;
    char* place = tile + Tile<T, D, kRows>::place(row, column / kPerChunk) + column % kPerChunk * kElementBytes<T>;
    if constexpr (T == DType::kFloat32) {
      std::memcpy(place, &value, 4);
    } else {
      const uint16_t bits = static_cast<uint16_t>(round_half<T>(value));
      std::memcpy(place, &bits, 2);
    }
  }
};

// A warp, or a warpgroup: its rows of a left tile by 32 of a right one; then sums as the left factor.
template <DType T, int D, bool kResident, bool kWarpgroups = false>
void test_products() {
  constexpr int kM = kWarpgroups ? 1 : 2, kN = 4, kWarps = kWarpgroups ? 4 : 1, kRows = kWarps * kM * 16;
  constexpr int kTileBytes = Tile<T, D, kRows>::kBytes;
  Numbers<T> numbers;
  float left[kRows][D], right[32][D], sums[kRows][32];
  for (auto& row : left) {
    for (float& x : row) x = numbers.draw();
  }
  for (auto& row : right) {
    for (float& x : row) x = numbers.draw();
  }
  for (auto& row : sums) {
    for (float& x : row) x = numbers.draw();
  }
  const auto body = [&] {
    if (thread_index() == 0) {
      char* memory = emulator::block()->shared.data();
      for (int d = 0; d < D; ++d) {
        for (int row = 0; row < kRows; ++row) numbers.template put<D, kRows>(memory, row, d, left[row][d]);
        for (int row = 0; row < 32; ++row) numbers.template put<D, 32>(memory + kTileBytes, row, d, right[row][d]);
      }
    }
    synchronize();
    Rows<T, kM, D, kRows, kResident> rows;
    const int first_row = warp() * 16 * kM;
    rows.load(0, first_row);
    float by_rows[kM][kN][4], factor[kM][kN][4], by_columns[kM][D / 8][4], dots[kM][2];
    clear(by_rows);
    clear(by_columns);
    multiply_by_rows<T, D, 32, kWarpgroups>(by_rows, rows, kTileBytes);
    rows.dot(rows, dots);
    add_up_rows(dots);
    const auto row_of = [first_row](int m, int i) { return first_row + 16 * m + 8 * (i / 2) + lane() / 4; };
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) {
        for (int i = 0; i < 4; ++i) factor[m][n][i] = sums[row_of(m, i)][lane_column(n, i % 2)];
      }
    }
    multiply_by_columns<T, D, 32, kWarpgroups>(by_columns, factor, kTileBytes);
    for (int m = 0; m < kM; ++m) {
      for (int i = 0; i < 4; ++i) {
        const int row = row_of(m, i);
        for (int n = 0; n < kN; ++n) {
          float sum = 0;
          for (int d = 0; d < D; ++d) sum += left[row][d] * right[lane_column(n, i % 2)][d];
          expect(by_rows[m][n][i] == sum, "a product by rows");
        }
        for (int n = 0; n < D / 8; ++n) {
          float sum = 0;
          for (int k = 0; k < 32; ++k) sum += sums[row][k] * right[k][lane_column(n, i % 2)];
          expect(by_columns[m][n][i] == sum, "a product by columns");
        }
        float sum = 0;
        for (int d = 0; d < D; ++d) sum += left[row][d] * left[row][d];
        expect(dots[m][i / 2] == sum, "products of rows with themselves");
      }
    }
  };
  constexpr int bytes = kTileBytes + Tile<T, D, 32>::kBytes;
  expect(emulator::run_grid(1, 32 * kWarps, bytes, {}, body) == 0, "no lanes of an ldmatrix meet in a bank");
}

template <DType T, int D>
void test_dimension() {
  test_places<T, D>();
  test_products<T, D, true>();
  test_products<T, D, false>();
  if constexpr (T != DType::kFloat32) {
    test_products<T, D, true, true>();
    test_products<T, D, false, true>();
  }
}

template <DType T>
void test_dtype() {
  test_dimension<T, 32>();
  test_dimension<T, 64>();
  test_dimension<T, 128>();
}

// The known answers of Salmon et al.'s Random123.
void test_draws() {
  uint32_t zeros[4] = {0, 0, 0, 0};
  philox(zeros, 0, 0);
  expect(zeros[0] == 0x6627e8d5 && zeros[1] == 0xe169c58d && zeros[2] == 0xbc57ac4c && zeros[3] == 0x9b00dbd8,
         "draws of zeros");
  uint32_t ones[4] = {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff};
  philox(ones, 0xffffffff, 0xffffffff);
  expect(ones[0] == 0x408f276d && ones[1] == 0x41c83b0e && ones[2] == 0xa20bc7c6 && ones[3] == 0x6d5451fd,
         "draws of ones");
}

void test_programs() {
  Arguments args{};
  args.op.batch_size = 3;
  args.op.num_heads = 5;
  args.blocks = 7;
  std::set<std::tuple<int, int, int>> found;
  emulator::run_grid(3 * 5 * 7, 32, 0, {}, [&] {
    const Program program(args);
    found.insert({program.sequence, program.head, program.block});
  });
  expect(found.size() == 3u * 5 * 7, "every block of every head of every sequence has a program");
  expect(*found.rbegin() == std::make_tuple(2, 4, 6), "and nothing else has");
}

// A sequence stays within its buffer and its bound, whatever is asked for.
void test_places_of_sequences() {
  const int32_t offsets[] = {-5, 0, 90, 200}, lengths[] = {10, 100, 50, 10};
  const Segments segments{offsets, lengths, 100, 30};
  for (int b = 0; b < 4; ++b) {
    const Place place(segments, b);
    expect(place.length == std::array<int, 4>{10, 30, 10, 0}[b], "lengths are cut to bound and buffer");
    expect(place.length == 0 || (place.offset >= 0 && place.offset + place.length <= 100), "tokens lie in the buffer");
  }
  const Place regular(Segments{nullptr, nullptr, 1000, 30}, 4);
  expect(regular.offset == 120 && regular.length == 30, "without offsets and lengths sequences follow one another");
}

template <DType T, int D, bool kDropout, bool kWarpgroups = false>
void print_kernels(const char* dtype) {
  const auto print = [dtype](const char* name, int threads, int bytes) {
    std::printf("%s %s %d %d %d %d %d\n", name, dtype, D, kDropout, kWarpgroups, threads, bytes);
  };
  using F = Forward<T, D, kDropout, kWarpgroups>;
  using Q = QueryGradient<T, D, kDropout, kWarpgroups>;
  using K = KeyGradient<T, D, kDropout, kWarpgroups>;
  print("Forward", F::kThreads, F::kSharedBytes);
  print("QueryGradient", Q::kThreads, Q::kSharedBytes);
  print("KeyGradient", K::kThreads, K::kSharedBytes);
  if constexpr (F::kHasWarpgroups && !kWarpgroups) print_kernels<T, D, kDropout, true>(dtype);
}

template <DType T>
void print_dtype(const char* dtype) {
  print_kernels<T, 32, false>(dtype);
  print_kernels<T, 32, true>(dtype);
  print_kernels<T, 64, false>(dtype);
  print_kernels<T, 64, true>(dtype);
  print_kernels<T, 128, false>(dtype);
  print_kernels<T, 128, true>(dtype);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--table") {
    print_dtype<DType::kFloat32>("float32");
    print_dtype<DType::kBFloat16>("bfloat16");
    print_dtype<DType::kFloat16>("float16");
    return 0;
  }
  test_dtype<DType::kFloat32>();
  test_dtype<DType::kBFloat16>();
  test_dtype<DType::kFloat16>();
  test_draws();
  test_programs();
  test_places_of_sequences();
  if (failures == 0) std::printf("all passed\n");
  return failures == 0 ? 0 : 1;
}
