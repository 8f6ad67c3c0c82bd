// Checks the kernels of one instruction set, LUKE_ISA, without Python: for sanitizers and valgrind, in memory of exactly
// the size that is asked for. Prints what fails; the exit code is the number of failures.
#include "../../csrc/cpu/kernels.cpp"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lk = luke_kernels;
namespace isa = luke_kernels::LUKE_ISA;

namespace {

int failures = 0;

#define CHECK(condition, ...)              \
  do {                                     \
    if (!(condition) && ++failures < 20) { \
      std::printf("%s: ", #condition);     \
      std::printf(__VA_ARGS__);            \
      std::printf("\n");                   \
    }                                      \
  } while (0)

// NaN is the largest error of all.
void raise(double& worst, double error) {
  if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
}

template <int kDegree>
std::vector<float> exp2_of(const std::vector<float>& x) {
  std::vector<float> y(x.size());
  for (size_t i = 0; i < x.size(); i += isa::Floats::kLanes) {
    isa::Floats::store(&y[i], isa::exp2<kDegree>(isa::Floats::load(&x[i])));
  }
  return y;
}

// Against libm, in double: at most 2 ulp; the coarse one a tenth of bfloat16's rounding, 2^-9.
void check_exp2() {
  std::vector<float> x(1 << 20);
  std::mt19937 random(0);
  std::uniform_real_distribution<float> near(-1, 0), far(-149, 0);
  for (size_t i = 0; i < x.size(); ++i) x[i] = i % 2 ? near(random) : far(random);
  const float special[] = {0, -0.0f, -1, -126, -149, -150, -1e4f, -INFINITY, -1e-30f, -0.5f, 1, 127, 0.999999f, NAN};
  std::copy(std::begin(special), std::end(special), x.begin());
  const std::vector<float> fine = exp2_of<isa::kFineDegree>(x), coarse = exp2_of<isa::kCoarseDegree>(x);
  double worst_ulps = 0, worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(x[i])) {
      CHECK(std::isnan(fine[i]) && std::isnan(coarse[i]), "2^NaN is %g, %g", fine[i], coarse[i]);
      continue;
    }
    const double exact = std::exp2(static_cast<double>(x[i]));
    const double ulp = std::exp2(std::fmax(std::floor(static_cast<double>(x[i])), -126) - 23);
    raise(worst_ulps, std::fabs(fine[i] - exact) / ulp);
    if (x[i] >= -126) raise(worst, std::fabs(coarse[i] - exact) / exact);
    CHECK(std::fabs(coarse[i] - exact) <= exact / 5120 + std::exp2(-149), "2^%g is %g, got %g", x[i], exact, coarse[i]);
  }
  std::printf("exp2: %.2f ulp; coarse: %.2e\n", worst_ulps, worst);
  CHECK(worst_ulps <= 2, "got %g", worst_ulps);
}

void check_float16() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const lk::float16 half{static_cast<uint16_t>(bits)};
    const float value = lk::to_float(half);
    const uint16_t back = lk::to_float16(value).bits;
    CHECK(std::isnan(value) ? std::isnan(lk::to_float(lk::float16{back})) : back == bits, "%x became %x", bits, back);
  }
}

float to_number(float x) { return x; }
float to_number(lk::bfloat16 x) { return lk::to_float(x); }
float to_number(lk::float16 x) { return lk::to_float(x); }
double to_number(double x) { return x; }
void assign(float& to, double x) { to = static_cast<float>(x); }
void assign(lk::bfloat16& to, double x) { to = lk::to_bfloat16(static_cast<float>(x)); }
void assign(lk::float16& to, double x) { to = lk::to_float16(static_cast<float>(x)); }
void assign(double& to, double x) { to = x; }

template <typename In, size_t kCount>
bool same(const std::array<std::vector<In>, kCount>& a, const std::array<std::vector<In>, kCount>& b) {
  for (size_t i = 0; i < kCount; ++i) {
    if (a[i].size() != b[i].size()) return false;
    if (!a[i].empty() && std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(In)) != 0) return false;
  }
  return true;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
std::unique_ptr<void, Free> scratch_of(int64_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, bytes));
}

// A head whose rows lie kGap numbers apart; what lies between must not be written, nor read to any effect: it is NaN.
template <typename In>
struct Inputs {
  using Accumulator = std::conditional_t<sizeof(In) == 8, double, float>;
  static constexpr int kSlots = 4, kGap = 3;

  Inputs(int64_t words, int64_t entities, int64_t head_dim, double scale) : sizes{words, entities}, stride(head_dim + kGap) {
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    head = lk::Head{};
    head.head_dim = head_dim;
    head.scale = scale;
    for (int kind = 0; kind < 2; ++kind) {
      lk::Tokens& tokens = head.tokens[kind];
      tokens.size = sizes[kind];
      const auto matrix = [&](std::vector<In>& buffer, bool drawn) {
        buffer.resize(sizes[kind] ? (sizes[kind] - 1) * stride + head_dim : 0);
        for (size_t i = 0; i < buffer.size(); ++i) {
          const bool gap = static_cast<int64_t>(i) % stride >= head_dim;
          assign(buffer[i], drawn && !gap ? normal(random) : NAN);
        }
        return lk::Matrix{buffer.data(), stride};
      };
      for (int slot = 0; slot < kSlots; ++slot) {
        lk::Matrix* const of[] = {&tokens.queries[0], &tokens.queries[1], &tokens.keys, &tokens.values};
        lk::Matrix* const gradient[] = {&tokens.dqueries[0], &tokens.dqueries[1], &tokens.dkeys, &tokens.dvalues};
        *of[slot] = matrix(inputs[kind][slot], true);
        *gradient[slot] = matrix(gradients[kind][slot], false);
      }
      tokens.dout = matrix(dout[kind], true);
      tokens.out = matrix(out[kind], false);
      lse[kind].assign(sizes[kind], NAN);
      tokens.lse = lse[kind].data();
    }
  }

  void check_gaps() const {
    for (const auto& buffer : {out[0], out[1], gradients[0][0], gradients[0][3], gradients[1][1], gradients[1][2]}) {
      for (size_t i = 0; i < buffer.size(); ++i) {
        const bool gap = static_cast<int64_t>(i) % stride >= head.head_dim;
        CHECK(!gap || std::isnan(to_number(buffer[i])), "%zu", i);
      }
    }
  }

  int64_t rows() const { return sizes[0] + sizes[1]; }
  int kind_of(int64_t row) const { return row >= sizes[0]; }
  template <class Buffers>
  double at(const Buffers& of, int64_t row, int64_t d) const {
    return to_number(of[kind_of(row)][(row - kind_of(row) * sizes[0]) * stride + d]);
  }
  template <class Buffers>
  double at(const Buffers& of, int slot, int64_t row, int64_t d) const {
    return to_number(of[kind_of(row)][slot][(row - kind_of(row) * sizes[0]) * stride + d]);
  }

  const int64_t sizes[2], stride;
  lk::Head head;
  std::vector<In> inputs[2][kSlots], dout[2];
  std::array<std::vector<In>, kSlots> gradients[2];
  std::array<std::vector<In>, 2> out;
  std::vector<Accumulator> lse[2];
};

template <typename In>
void check_attention(lk::DType dtype, double tolerance, int64_t words, int64_t entities, int64_t head_dim,
                     double scale) {
  Inputs<In> x(words, entities, head_dim, scale);
  const lk::Kernels& kernels = lk::LUKE_JOIN(kernels_, LUKE_ISA);
  const int64_t rows = x.rows();
  const lk::Span all = {0, rows};
  const lk::Part part = {x.head, all};
  kernels.forward(dtype, part, &part, scratch_of(kernels.forward_scratch_bytes(dtype, head_dim)).get());
  const auto scratch = scratch_of(kernels.backward_scratch_bytes(dtype, head_dim, rows));
  kernels.backward(dtype, x.head, all, all, {true, true}, scratch.get());
  x.check_gaps();

  // In parts: the same bits.
  const auto out = x.out, dwords = x.gradients[0], dentities = x.gradients[1];
  const int64_t cut = rows / 3 / 16 * 16;
  for (const lk::Span slice : {lk::Span{0, cut}, lk::Span{cut, rows}}) {
    const lk::Part piece = {x.head, slice};
    kernels.forward(dtype, piece, nullptr, scratch_of(kernels.forward_scratch_bytes(dtype, head_dim)).get());
    kernels.backward(dtype, x.head, slice, all, {false, true}, scratch.get());
    kernels.backward(dtype, x.head, all, slice, {true, false}, scratch.get());
  }
  CHECK(same(out, x.out) && same(dwords, x.gradients[0]) && same(dentities, x.gradients[1]),
        "dtype %d, %ld words, %ld entities in parts", static_cast<int>(dtype), static_cast<long>(words),
        static_cast<long>(entities));

  // By the formula, in double.
  std::vector<double> p(rows * rows), ds(rows * rows), dot(rows, 0), expected_out(rows * head_dim, 0);
  double worst = 0;
  const auto compare = [&](double got, double expected) { raise(worst, std::fabs(got - expected)); };
  for (int64_t i = 0; i < rows; ++i) {
    double most = -INFINITY, sum = 0;
    for (int64_t j = 0; j < rows; ++j) {
      double score = 0;
      for (int64_t d = 0; d < head_dim; ++d) score += x.at(x.inputs, x.kind_of(j), i, d) * x.at(x.inputs, 2, j, d);
      p[i * rows + j] = score * x.head.scale;
      most = std::fmax(most, p[i * rows + j]);
    }
    for (int64_t j = 0; j < rows; ++j) sum += p[i * rows + j] = std::exp(p[i * rows + j] - most);
    compare(x.lse[x.kind_of(i)][i - x.kind_of(i) * words], most + std::log(sum));
    for (int64_t j = 0; j < rows; ++j) {
      p[i * rows + j] /= sum;
      for (int64_t d = 0; d < head_dim; ++d) expected_out[i * head_dim + d] += p[i * rows + j] * x.at(x.inputs, 3, j, d);
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      compare(x.at(x.out, i, d), expected_out[i * head_dim + d]);
      dot[i] += x.at(x.dout, i, d) * expected_out[i * head_dim + d];
    }
  }
  std::vector<double> gradients(4 * rows * head_dim, 0);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < rows; ++j) {
      double dp = 0;
      for (int64_t d = 0; d < head_dim; ++d) dp += x.at(x.dout, i, d) * x.at(x.inputs, 3, j, d);
      const double pair = p[i * rows + j], difference = pair * (dp - dot[i]) * x.head.scale;
      for (int64_t d = 0; d < head_dim; ++d) {
        const int query = x.kind_of(j);
        gradients[(query * rows + i) * head_dim + d] += difference * x.at(x.inputs, 2, j, d);
        gradients[(2 * rows + j) * head_dim + d] += difference * x.at(x.inputs, query, i, d);
        gradients[(3 * rows + j) * head_dim + d] += pair * x.at(x.dout, i, d);
      }
    }
  }
  for (int slot = 0; slot < 4; ++slot) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < head_dim; ++d) {
        compare(x.at(x.gradients, slot, i, d), gradients[(slot * rows + i) * head_dim + d]);
      }
    }
  }
  CHECK(worst <= tolerance, "dtype %d, %ld words, %ld entities, head_dim %ld: error %g", static_cast<int>(dtype),
        static_cast<long>(words), static_cast<long>(entities), static_cast<long>(head_dim), worst);
}

}  // namespace

int main() {
#if defined(__AMX_BF16__)
  syscall(SYS_arch_prctl, 0x1023, 18);  // as isa.cpp does
#endif
  check_exp2();
  check_float16();
  constexpr int64_t kSizes[][3] = {{1, 0, 16}, {0, 1, 16},  {3, 2, 1},   {17, 5, 20},   {64, 16, 64},
                                   {65, 1, 7}, {31, 33, 48}, {97, 70, 33}, {130, 3, 128}, {20, 9, 256}};
  double scale = 0.3;
  for (const auto& [words, entities, head_dim] : kSizes) {
#if !defined(__AVX512BF16__)
    check_attention<double>(lk::DType::kFloat64, 1e-11, words, entities, head_dim, scale);
    check_attention<float>(lk::DType::kFloat32, 1e-4, words, entities, head_dim, scale);
    check_attention<lk::float16>(lk::DType::kFloat16, 0.02, words, entities, head_dim, scale);
#endif
    check_attention<lk::bfloat16>(lk::DType::kBFloat16, 0.2, words, entities, head_dim, scale);
    scale = -scale;
  }
  // Several blocks of keys and of queries; and scores that are all zero.
#if !defined(__AVX512BF16__)
  check_attention<double>(lk::DType::kFloat64, 1e-11, 1030, 130, 64, 0.2);
  check_attention<float>(lk::DType::kFloat32, 1e-4, 1030, 130, 32, 0.2);
#endif
  check_attention<lk::bfloat16>(lk::DType::kBFloat16, 0.2, 50, 21, 32, 0);
  std::printf("%d failures\n", failures);
  return failures < 100 ? failures : 100;
}
