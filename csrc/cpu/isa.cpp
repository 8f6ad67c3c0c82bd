// Which instruction set's kernels run.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../attention.h"

namespace luke_kernels {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool runs;
};

// The best last.
const Isa (&isas())[4] {
#if defined(LUKE_X86)
  static const Isa all[4] = {
      {"portable", &kernels_portable, true},
      {"avx2", &kernels_avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {"avx512", &kernels_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {"avx512_bf16", &kernels_avx512_bf16,
       __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
  };
#else
  static const Isa all[4] = {{"portable", &kernels_portable, true},
                             {"avx2", nullptr, false},
                             {"avx512", nullptr, false},
                             {"avx512_bf16", nullptr, false}};
#endif
  return all;
}

// The best that runs, up to the one named; null for a name that there is none of.
const Isa* best(const char* cap) {
  const Isa* found = nullptr;
  for (const Isa& isa : isas()) {
    if (isa.runs) found = &isa;
    if (cap && std::strcmp(isa.name, cap) == 0) return found;
  }
  return cap ? nullptr : found;
}

const Isa* chosen = best(nullptr);

}  // namespace

const Kernels& kernels() { return *chosen->kernels; }

const char* cpu_isa() { return chosen->name; }

void set_cpu_isa(const char* name) {
  const Isa* isa = best(name);
  if (!isa) {
    throw std::invalid_argument(
        std::string("LUKE_KERNELS_CPU_ISA must be portable, avx2, avx512 or avx512_bf16, got '") + name + "'");
  }
  chosen = isa;
}

}  // namespace luke_kernels
