#include "parallel.h"

#include "../attention.h"

#include <pthread.h>

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

void parallel_for(int num_threads, int64_t tasks, int64_t chunk, void (*task)(int64_t, const void*),
                  const void* context) {
#ifdef _OPENMP
  if (num_threads > 1 && tasks > 1 && !in_forked_child) {
    // An exception may not leave a parallel region.
    std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(num_threads)
    for (int64_t index = 0; index < tasks; ++index) {
      try {
        task(index, context);
      } catch (...) {
#pragma omp critical(luke_kernels_failure)
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  static_cast<void>(num_threads);
  static_cast<void>(chunk);
  for (int64_t index = 0; index < tasks; ++index) task(index, context);
}

void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(::operator new(bytes, kAlignment));
    size = bytes;
  }
  return memory.get();
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace luke_kernels
