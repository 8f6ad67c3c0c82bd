// Threads, and the memory each of them keeps from call to call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace luke_kernels {

// Runs task(index, context) for every index, `chunk` neighbours at a time on one thread.
void parallel_for(int num_threads, int64_t tasks, int64_t chunk, void (*task)(int64_t index, const void* context),
                  const void* context);

template <typename Task>
void parallel_for(int num_threads, int64_t tasks, int64_t chunk, const Task& task) {
  parallel_for(
      num_threads, tasks, chunk,
      [](int64_t index, const void* context) { (*static_cast<const Task*>(context))(index); }, &task);
}

// Memory of this thread, aligned to 64, that grows and is used again.
void* thread_scratch(size_t bytes);

}  // namespace luke_kernels
