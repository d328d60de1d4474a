#include "server/scheduler/task_queue.h"

#include <algorithm>

namespace nestor {

void TaskQueue::Push(const QueuedTask& task) {
  const Key key(task.priority, task.id);
  tasks_.emplace(key, task);
  keys_.emplace(task.id, key);
}

std::optional<QueuedTask> TaskQueue::Front() const {
  if (tasks_.empty()) return std::nullopt;
  return tasks_.begin()->second;
}

bool TaskQueue::Remove(TaskId id) {
  const auto found = keys_.find(id);
  if (found == keys_.end()) return false;
  tasks_.erase(found->second);
  keys_.erase(found);
  return true;
}

std::vector<TaskId> TaskQueue::TakeExpired(TimePoint now) {
  std::vector<TaskId> expired;
  for (const auto& [key, task] : tasks_) {
    if (task.deadline <= now) expired.push_back(task.id);
  }
  for (const TaskId id : expired) Remove(id);
  return expired;
}

std::vector<TaskId> TaskQueue::TakeAll() {
  std::vector<TaskId> all;
  for (const auto& [key, task] : tasks_) all.push_back(task.id);
  tasks_.clear();
  keys_.clear();
  return all;
}

TimePoint TaskQueue::EarliestDeadline() const {
  TimePoint earliest = TimePoint::max();
  for (const auto& [key, task] : tasks_) earliest = std::min(earliest, task.deadline);
  return earliest;
}

}  // namespace nestor
