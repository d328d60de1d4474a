#include "server/scheduler/step_planner.h"

#include <algorithm>

namespace nestor {
namespace {

// "For nothing" is within what predictions can tell apart.
constexpr double kFreeRaise = 1.01;

using Entry = StepDecision::Entry;

// Tasks that decode first; each kind by priority, then first come first served.
bool RunsBefore(const TaskView& a, const TaskView& b) {
  const bool decodes_a = a.prompt_left == 0;
  const bool decodes_b = b.prompt_left == 0;
  if (decodes_a != decodes_b) return decodes_a;
  return a.sla->priority != b.sla->priority ? a.sla->priority < b.sla->priority : a.id < b.id;
}

void SelectRows(const StepSnapshot& snapshot, std::vector<Entry>* entries) {
  const StepLimits& limits = snapshot.limits;
  const std::vector<TaskView>& tasks = snapshot.tasks;
  entries->clear();
  for (size_t task = 0; task < tasks.size(); ++task) entries->push_back({.task = task});
  std::sort(entries->begin(), entries->end(), [&](const Entry& a, const Entry& b) {
    return RunsBefore(tasks[a.task], tasks[b.task]);
  });
  int64_t rows_left = limits.max_step_rows;
  const auto first_prompt = std::find_if(entries->begin(), entries->end(), [&](const Entry& entry) {
    return tasks[entry.task].prompt_left > 0;
  });
  for (auto entry = entries->begin(); entry != first_prompt && rows_left > 0; ++entry) {
    entry->rows = 1;
    --rows_left;
  }
  int64_t prompt_rows_left =
      limits.splits_prompts ? std::min(limits.prefill_chunk, rows_left) : rows_left;
  for (auto entry = first_prompt; entry != entries->end() && prompt_rows_left > 0; ++entry) {
    const int64_t wanted = tasks[entry->task].prompt_left;
    // A text that does not fit whole waits; being the oldest soon, it comes first then.
    if (!limits.splits_prompts && wanted > prompt_rows_left) continue;
    entry->rows = std::min(wanted, prompt_rows_left);
    prompt_rows_left -= entry->rows;
  }
  std::erase_if(*entries, [](const Entry& entry) { return entry.rows == 0; });
}

// Chooses the level of every entry, given the rest of the step.
class LevelChooser {
 public:
  LevelChooser(const StepSnapshot& snapshot, TimePoint now, StepDecision* decision)
      : snapshot_(snapshot),
        now_(now),
        entries_(decision->entries),
        rows_by_level_(decision->rows_by_level),
        tasks_by_level_(decision->tasks_by_level) {
    rows_by_level_.assign(snapshot.num_levels, 0);
    tasks_by_level_.assign(snapshot.num_levels, 0);
  }

  void Choose() {
    for (Entry& entry : entries_) {
      entry.level = SlaOf(entry).levels.front();
      Add(entry, entry.level, 1);
    }
    // Entries of one kind stand in order of service; going backwards, low priorities come first.
    for (auto entry = entries_.rbegin(); entry != entries_.rend(); ++entry) {
      if (SlaOf(*entry).has_target()) ChooseFor(&*entry);
    }
    Raise();
  }

 private:
  const Sla& SlaOf(const Entry& entry) const { return *snapshot_.tasks[entry.task].sla; }

  // Counts the entry's rows at `level`, and its task, which is taken to have one row in the decode
  // steps that follow. `sign` is 1 or -1.
  void Add(const Entry& entry, int level, int sign) {
    rows_by_level_[level] += sign * entry.rows;
    tasks_by_level_[level] += sign;
  }

  void Move(Entry* entry, int level) {
    Add(*entry, entry->level, -1);
    entry->level = level;
    Add(*entry, level, 1);
  }

  // Which target the task would miss if it ran on as `entries_` now says.
  Degradation MissedBy(const Entry& entry) const {
    const TaskView& task = snapshot_.tasks[entry.task];
    const Duration step = snapshot_.cost_model->Predict(rows_by_level_);
    const bool is_prefill = task.prompt_left > 0;
    if (!is_prefill && task.sla->per_token_target.has_value() && task.last_token.has_value() &&
        now_ + step > *task.last_token + *task.sla->per_token_target) {
      return Degradation::kPerTokenTarget;
    }
    const int64_t prompt_steps = (task.prompt_left + entry.rows - 1) / entry.rows;
    const Duration prefill = is_prefill ? step * prompt_steps : Duration::zero();
    if (is_prefill && task.sla->first_token_target.has_value() &&
        now_ + prefill > task.arrival + *task.sla->first_token_target) {
      return Degradation::kFirstTokenTarget;
    }
    if (!task.sla->latency_target.has_value()) return Degradation::kNone;
    // The last prompt step gives the first token.
    const int64_t decode_steps = std::max<int64_t>(0, task.tokens_left - (is_prefill ? 1 : 0));
    const Duration decode = decode_steps == 0
                                ? Duration::zero()
                                : snapshot_.cost_model->Predict(tasks_by_level_) * decode_steps;
    return now_ + prefill + decode > task.arrival + *task.sla->latency_target
               ? Degradation::kLatencyTarget
               : Degradation::kNone;
  }

  // Alone in a step: what a level is worth does not hang on who else still runs at a slow one.
  Duration TimeAlone(const Entry& entry, int level) const {
    return snapshot_.cost_model->Predict(level, entry.rows);
  }

  void ChooseFor(Entry* entry) {
    int fastest = entry->level;
    Duration fastest_time = Duration::max();
    Degradation reason = Degradation::kNone;
    for (const int level : SlaOf(*entry).levels) {
      Move(entry, level);
      const Degradation missed = MissedBy(*entry);
      if (missed == Degradation::kNone) {
        entry->degradation = reason;
        return;
      }
      if (reason == Degradation::kNone) reason = missed;
      const Duration time = TimeAlone(*entry, level);
      if (time < fastest_time) {
        fastest_time = time;
        fastest = level;
      }
    }
    Move(entry, fastest);
    entry->degradation = fastest == SlaOf(*entry).levels.front() ? Degradation::kNone : reason;
  }

  void Raise() {
    const Duration limit =
        DurationOfSeconds(SecondsOf(snapshot_.cost_model->Predict(rows_by_level_)) * kFreeRaise);
    for (Entry& entry : entries_) {
      const int chosen = entry.level;
      for (const int level : SlaOf(entry).levels) {
        if (level == chosen) break;
        Move(&entry, level);
        if (snapshot_.cost_model->Predict(rows_by_level_) <= limit) break;
        Move(&entry, chosen);
      }
      if (entry.level == SlaOf(entry).levels.front()) entry.degradation = Degradation::kNone;
    }
  }

  const StepSnapshot& snapshot_;
  const TimePoint now_;
  std::vector<Entry>& entries_;
  std::vector<int64_t>& rows_by_level_;
  std::vector<int64_t>& tasks_by_level_;
};

}  // namespace

const char* NameOf(Degradation degradation) {
  switch (degradation) {
    case Degradation::kNone:
      return "";
    case Degradation::kLatencyTarget:
      return "latency_target";
    case Degradation::kFirstTokenTarget:
      return "first_token_target";
    case Degradation::kPerTokenTarget:
      return "per_token_target";
  }
  return "";
}

void PlanStep(const StepSnapshot& snapshot, TimePoint now, StepDecision* decision) {
  SelectRows(snapshot, &decision->entries);
  LevelChooser(snapshot, now, decision).Choose();
  decision->predicted = decision->entries.empty()
                            ? Duration::zero()
                            : snapshot.cost_model->Predict(decision->rows_by_level);
}

}  // namespace nestor
