// Threads, the memory each of them keeps from call to call, and the pages of other memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace luke_kernels {

// Runs task(index, next, context) for every index. `next` is what the same thread runs after it, where it is
// known, or `tasks`.
void parallel_for(int num_threads, int64_t tasks, void (*task)(int64_t index, int64_t next, const void* context),
                  const void* context);

template <typename Task>
void parallel_for(int num_threads, int64_t tasks, const Task& task) {
  parallel_for(
      num_threads, tasks,
      [](int64_t index, int64_t next, const void* context) { (*static_cast<const Task*>(context))(index, next); },
      &task);
}

// Memory of this thread, aligned to 64, that grows and is used again: by a task, or by what its tasks share.
enum class Use { kTask, kShared };
void* thread_scratch(size_t bytes, Use use = Use::kTask);

// Asks that fresh memory which is about to be written comes in huge pages: one page fault in place of 512.
void expect_huge_pages(void* memory, int64_t bytes);

}  // namespace luke_kernels
