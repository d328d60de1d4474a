// A steady step, one like those before it, allocates nothing: neither the engine, nor the CPU
// backend on any of its threads, nor the samplers.

#include <algorithm>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/sampler.h"
#include "engine/speculation.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/testing/allocation_counter.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_nested_model.h"

namespace nestor {
namespace {

constexpr int kVocabulary = 258;
constexpr int kSteadySteps = 200;

// Calls that the compiler cannot leave out.
void* volatile kept;

TEST(AllocationCounterTest, CountsEveryFormOfNewOnEveryThread) {
  const int64_t before = NumAllocations();
  kept = ::operator new(8);
  ::operator delete(kept);
  kept = ::operator new[](8);
  ::operator delete[](kept);
  kept = ::operator new(64, std::align_val_t(64));
  ::operator delete(kept, std::align_val_t(64));
  kept = ::operator new[](64, std::align_val_t(64));
  ::operator delete[](kept, std::align_val_t(64));
  kept = ::operator new(8, std::nothrow);
  ::operator delete(kept, std::nothrow);
  kept = ::operator new(64, std::align_val_t(64), std::nothrow);
  ::operator delete(kept, std::align_val_t(64), std::nothrow);
  EXPECT_EQ(NumAllocations() - before, 6);
  int64_t of_thread = 0;
  std::thread([&of_thread] {
    const int64_t begin = NumAllocations();
    kept = ::operator new(8);
    ::operator delete(kept);
    of_thread = NumAllocations() - begin;
  }).join();
  EXPECT_EQ(of_thread, 1);
}

class AllocationTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = std::make_unique<TemporaryDirectory>();
    const absl::Status written = WriteTinyNestedModel(directory_->path(), {.context_length = 2048});
    ASSERT_TRUE(written.ok()) << written;
  }
  static void TearDownTestSuite() { directory_.reset(); }

  static std::unique_ptr<Engine> MakeEngine(const CpuOptions& options) {
    auto model = NestedModel::Open(directory_->path() + "/nested");
    EXPECT_TRUE(model.ok()) << model.status();
    auto backend = MakeCpuBackend(options);
    EXPECT_TRUE(backend.ok()) << backend.status();
    auto engine = Engine::Create(*std::move(model), *std::move(backend), {.max_sequences = 32});
    EXPECT_TRUE(engine.ok()) << engine.status();
    return *std::move(engine);
  }

  static inline std::unique_ptr<TemporaryDirectory> directory_;
};

SamplingOptions SamplingOf(size_t stream) {
  const SamplingOptions options[] = {
      {},
      {.temperature = 1, .seed = stream},
      {.temperature = 1.5, .top_p = 0.9, .seed = stream},
      {.temperature = 0.8, .top_k = 40, .repetition_penalty = 1.2, .seed = stream},
  };
  return options[stream % std::size(options)];
}

// Generations that decode together, as who runs an engine keeps them.
class Streams {
 public:
  struct Options {
    std::vector<int> levels;  // one for each stream
    bool may_run_any = false;
    int64_t prompt = 5;  // tokens; every other stream has one more
    int64_t length = 512;
  };

  Streams(Engine* engine, const Options& options) : engine_(engine), next_(options.levels.size()) {
    std::mt19937 random(7);
    for (size_t i = 0; i < next_.size(); ++i) {
      const SequenceId sequence = *engine->AddSequence(options.length);
      std::vector<int32_t> prompt(static_cast<size_t>(options.prompt) + i % 2);
      for (int32_t& token : prompt) token = static_cast<int32_t>(random() % kVocabulary);
      samplers_.emplace_back(SamplingOf(i));
      samplers_.back().AddContext(prompt);
      std::span<const int32_t> rest = prompt;
      while (!rest.empty()) {
        const auto chunk = rest.first(std::min<size_t>(rest.size(), 512));
        const auto ran = engine->Step({{{.sequence = sequence,
                                         .tokens = chunk,
                                         .level = options.levels[i],
                                         .output = StepEntry::Output::kLastLogits}}});
        EXPECT_TRUE(ran.ok()) << ran.status();
        if (chunk.size() == rest.size()) next_[i] = samplers_[i].Sample(ran->entries[0].values);
        rest = rest.subspan(chunk.size());
      }
      plan_.entries.push_back({.sequence = sequence,
                               .tokens = {&next_[i], 1},
                               .level = options.levels[i],
                               .may_run = options.may_run_any ? ~LevelSet{0} : 0,
                               .output = StepEntry::Output::kLastLogits});
    }
  }
  ~Streams() {
    for (const StepEntry& entry : plan_.entries) engine_->RemoveSequence(entry.sequence);
  }

  // False where something failed.
  bool Step() {
    if (!engine_->Step(plan_, &result_).ok()) return false;
    for (size_t i = 0; i < next_.size(); ++i) {
      if (!result_.entries[i].status.ok()) return false;
      next_[i] = samplers_[i].Sample(result_.entries[i].values);
    }
    return true;
  }

  // From the next step on, all of them.
  void SetLevel(int level) {
    for (StepEntry& entry : plan_.entries) entry.level = level;
  }

  // Of steps after the first three, all together.
  int64_t AllocationsOfSteadySteps(int count) {
    bool is_ok = Step() && Step() && Step();
    const int64_t before = NumAllocations();
    for (int step = 0; step < count; ++step) is_ok = Step() && is_ok;
    const int64_t allocations = NumAllocations() - before;
    EXPECT_TRUE(is_ok);
    return allocations;
  }

  const StepPlan& plan() const { return plan_; }

 private:
  Engine* const engine_;
  std::vector<int32_t> next_;
  std::vector<Sampler> samplers_;
  StepPlan plan_;
  StepResult result_;
};

// Every level in turn.
std::vector<int> MixedLevels(const Engine& engine, size_t streams) {
  std::vector<int> levels(streams);
  for (size_t i = 0; i < streams; ++i)
    levels[i] = static_cast<int>(i % engine.model().levels().size());
  return levels;
}

TEST_F(AllocationTest, TheModelHasLevelsOfEveryForm) {
  const auto engine = MakeEngine({.num_threads = 1});
  std::vector<std::string> ladders;
  for (const Level& level : engine->model().levels()) ladders.push_back(level.ladder);
  EXPECT_THAT(ladders, ::testing::IsSupersetOf({"residual", "prefix"}));
  EXPECT_THAT(ladders.back(), ::testing::AllOf(testing::Ne("residual"), testing::Ne("prefix")));
}

// A result of its own for every step is what the count must see.
TEST_F(AllocationTest, AStepThatReturnsItsResultAllocates) {
  const auto engine = MakeEngine({.num_threads = 2});
  Streams streams(engine.get(), {.levels = {0, 1}});
  ASSERT_TRUE(streams.Step());
  const int64_t before = NumAllocations();
  ASSERT_TRUE(engine->Step(streams.plan()).ok());
  EXPECT_GT(NumAllocations() - before, 0);
}

TEST_F(AllocationTest, SteadyStepsAtOneLevelDoNotAllocate) {
  const auto engine = MakeEngine({.num_threads = 2});
  for (int level = 0; level < static_cast<int>(engine->model().levels().size()); ++level) {
    for (const size_t count : {1, 5}) {
      Streams streams(engine.get(), {.levels = std::vector<int>(count, level)});
      EXPECT_EQ(streams.AllocationsOfSteadySteps(20), 0) << "level " << level << ", " << count;
    }
  }
}

TEST_F(AllocationTest, SteadyStepsAtMixedLevelsDoNotAllocate) {
  const auto engine = MakeEngine({.num_threads = 3});
  // Few rows and many.
  for (const size_t count : {2, 7, 16, 17, 32}) {
    for (const bool may_run_any : {false, true}) {
      Streams streams(engine.get(),
                      {.levels = MixedLevels(*engine, count), .may_run_any = may_run_any});
      EXPECT_EQ(streams.AllocationsOfSteadySteps(kSteadySteps), 0) << count << " streams";
    }
  }
}

TEST_F(AllocationTest, NoInstructionSetAllocates) {
  for (const CpuInstructionSet set : {CpuInstructionSet::kPortable, CpuInstructionSet::kAvx2,
                                      CpuInstructionSet::kAvx512, CpuInstructionSet::kAvx512Bf16}) {
    if (set > BestInstructionSet()) continue;
    const auto engine = MakeEngine({.num_threads = 2, .instruction_set = set});
    for (const size_t count : {3, 20}) {
      Streams streams(engine.get(), {.levels = MixedLevels(*engine, count)});
      EXPECT_EQ(streams.AllocationsOfSteadySteps(20), 0) << InstructionSetName(set) << count;
    }
  }
}

// 880 positions to 1,080: 13 pages are begun, and the scores of a head outgrow 1,024.
TEST_F(AllocationTest, ALongGenerationDoesNotAllocateAsItGrows) {
  const auto engine = MakeEngine({.num_threads = 2});
  Streams streams(engine.get(), {.levels = MixedLevels(*engine, 3), .prompt = 880, .length = 1100});
  EXPECT_EQ(streams.AllocationsOfSteadySteps(kSteadySteps), 0);
}

// The engine is as ready for its second company as for its first.
TEST_F(AllocationTest, OneStreamLessDoesNotAllocate) {
  const auto engine = MakeEngine({.num_threads = 2});
  for (const size_t count : {32, 31, 12, 4}) {
    Streams streams(engine.get(), {.levels = MixedLevels(*engine, count)});
    EXPECT_EQ(streams.AllocationsOfSteadySteps(5), 0) << count << " streams";
  }
}

// A scheduler changes levels whenever it likes, a speculation policy those of its drafts.
TEST_F(AllocationTest, TheFirstStepAtAnotherLevelDoesNotAllocate) {
  for (const size_t count : {1, 5}) {
    const auto engine = MakeEngine({.num_threads = 2});
    Streams streams(engine.get(), {.levels = std::vector<int>(count, 0)});
    EXPECT_EQ(streams.AllocationsOfSteadySteps(2), 0);
    for (int level = 1; level < static_cast<int>(engine->model().levels().size()); ++level) {
      streams.SetLevel(level);
      const int64_t before = NumAllocations();
      EXPECT_TRUE(streams.Step());
      EXPECT_EQ(NumAllocations() - before, 0) << "level " << level << ", " << count << " streams";
    }
  }
}

TEST_F(AllocationTest, SteadyRoundsOfSpeculationDoNotAllocate) {
  const auto engine = MakeEngine({.num_threads = 2});
  const SequenceId sequence = *engine->AddSequence(1024);
  const int full = static_cast<int>(engine->model().levels().size()) - 1;
  SpeculativeRound round(engine.get());
  for (const SamplingOptions& options :
       {SamplingOptions{}, SamplingOptions{.temperature = 1, .top_p = 0.95, .seed = 3}}) {
    Sampler sampler(options);
    int32_t token = 5;
    bool is_ok = true;
    int64_t before = 0;
    for (int i = 0; i < 50; ++i) {
      if (i == 5) before = NumAllocations();  // rounds of every length have run
      is_ok = round
                  .Run({.sequence = sequence,
                        .token = token,
                        .draft_level = 0,
                        .verify_level = full,
                        .num_drafts = i % 5},
                       &sampler)
                  .ok() &&
              round.sequence_status().ok() && is_ok;
      do {
        token = sampler.Sample(round.logits());
      } while (round.Accept(token));
      round.Settle();
    }
    EXPECT_EQ(NumAllocations() - before, 0);
    EXPECT_TRUE(is_ok);
  }
}

}  // namespace
}  // namespace nestor
