// Which instruction set's kernels run.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../attention.h"

namespace luke_kernels {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  const Kernels* bfloat16_kernels;
  bool runs;
  bool splits_float32 = false;  // in linear layers: into bfloat16
};

#if defined(LUKE_AMX)

// The system keeps the registers of AMX for processes that ask.
bool has_amx() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

#endif

// The best last.
const std::vector<Isa>& isas() {
#if defined(LUKE_X86)
  static const std::vector<Isa> all = [] {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    return std::vector<Isa>{
        {"portable", &kernels_portable, &kernels_portable, true},
        {"avx2", &kernels_avx2, &kernels_avx2, avx2},
        {"avx512", &kernels_avx512, &kernels_avx512, avx512},
        {"avx512_bf16", &kernels_avx512, &kernels_avx512_bf16, avx512_bf16},
#if defined(LUKE_AMX)
        {"amx", &kernels_avx512, &kernels_amx, avx512_bf16 && has_amx(), true},
#else
        {"amx", nullptr, nullptr, false},
#endif
    };
  }();
#else
  static const std::vector<Isa> all = {{"portable", &kernels_portable, &kernels_portable, true},
                                       {"avx2", nullptr, nullptr, false},
                                       {"avx512", nullptr, nullptr, false},
                                       {"avx512_bf16", nullptr, nullptr, false},
                                       {"amx", nullptr, nullptr, false}};
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

const Kernels& kernels(DType dtype) {
  return dtype == DType::kBFloat16 ? *chosen->bfloat16_kernels : *chosen->kernels;
}

const Kernels& linear_kernels(DType dtype) {
  return dtype == DType::kFloat32 && chosen->splits_float32 ? *chosen->bfloat16_kernels : kernels(dtype);
}

const char* cpu_isa() { return chosen->name; }

void set_cpu_isa(const char* name) {
  const Isa* isa = best(name);
  if (!isa) {
    throw std::invalid_argument(
        std::string("LUKE_KERNELS_CPU_ISA must be portable, avx2, avx512, avx512_bf16 or amx, got '") + name + "'");
  }
  chosen = isa;
}

}  // namespace luke_kernels
