#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "server/scheduler/time.h"

namespace nestor {

// One request inside the server, or one text of an Embed request.
using TaskId = int64_t;

struct QueuedTask {
  TaskId id = 0;
  int priority = 1;
  TimePoint deadline = TimePoint::max();
  int64_t length = 0;  // positions its sequence will need
};

// Tasks that wait for a place in the engine: by priority, first come first served inside one.
// Not thread-safe.
class TaskQueue {
 public:
  // REQUIRES: ids ascend from call to call.
  void Push(const QueuedTask& task);
  // The task that is next in line, or none.
  std::optional<QueuedTask> Front() const;
  // False where the task is not waiting.
  bool Remove(TaskId id);
  // Removes and returns the tasks whose deadline is not after `now`.
  std::vector<TaskId> TakeExpired(TimePoint now);
  // Removes and returns all, in order.
  std::vector<TaskId> TakeAll();
  TimePoint EarliestDeadline() const;  // TimePoint::max() where there is none
  int64_t size() const { return static_cast<int64_t>(tasks_.size()); }

 private:
  using Key = std::pair<int, TaskId>;  // (priority, id): the order of service
  std::map<Key, QueuedTask> tasks_;
  std::map<TaskId, Key> keys_;
};

}  // namespace nestor
