#include "parallel.h"

#include "../attention.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace luke_kernels {
namespace {

constexpr std::align_val_t kAlignment{64};

// GNU OpenMP's threads do not survive a fork: a parallel region in the child would wait for them for ever.
bool in_forked_child = false;
[[maybe_unused]] const int fork_watch = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

}  // namespace

void parallel_for(int num_threads, int64_t tasks, void (*task)(int64_t, int64_t, const void*), const void* context) {
#ifdef _OPENMP
  if (num_threads > 1 && tasks > 1 && !in_forked_child) {
    // An exception may not leave a parallel region.
    std::exception_ptr failure;
    std::atomic<int64_t> untaken{0};
#pragma omp parallel num_threads(num_threads)
    {
      const auto take = [&](int64_t most) {
        int64_t index = untaken.load();
        while (index < most && !untaken.compare_exchange_weak(index, index + 1)) {
        }
        return index < most ? index : tasks;
      };
      // One task ahead, but for the last ones, which go to whom is free.
      const int64_t last = tasks - 2 * num_threads;
      for (int64_t index, next = tasks; (index = next < tasks ? next : take(tasks)) < tasks;) {
        next = take(last);
        try {
          task(index, next, context);
        } catch (...) {
#pragma omp critical(luke_kernels_failure)
          failure = std::current_exception();
        }
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  static_cast<void>(num_threads);
  for (int64_t index = 0; index < tasks; ++index) task(index, std::min(index + 1, tasks), context);
}

void* thread_scratch(size_t bytes, Use use) {
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  struct Scratch {
    std::unique_ptr<void, Free> memory;
    size_t size = 0;
  };
  thread_local Scratch scratches[2];
  Scratch& scratch = scratches[static_cast<int>(use)];
  if (scratch.size < bytes) {
    scratch.memory.reset();
    scratch.size = 0;
    scratch.memory.reset(::operator new(bytes, kAlignment));
    scratch.size = bytes;
  }
  return scratch.memory.get();
}

void expect_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  // Those of x86-64, and of arm64 with pages of 4 KB. Elsewhere, and where the system has none, this asks in vain.
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace luke_kernels
