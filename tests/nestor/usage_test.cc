#include "nestor/usage.h"

#include <google/protobuf/text_format.h>

#include <optional>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace nestor {
namespace {

v1::Usage UsageOf(const std::string& text) {
  v1::Usage usage;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &usage)) << text;
  return usage;
}

v1::Usage MixedUsage() {
  return UsageOf(R"pb(
    prompt_levels { level: 1 tokens: 5 }
    completion_levels { level: 3 tokens: 12 }
    completion_levels { level: 2 tokens: 20 }
    mean_relative_cost: 0.625
    mean_relative_flops: 1.25
    flops: 1e9
    expected_quality: 0.875
    queue_time { nanos: 500000000 }
    prefill_time { seconds: 1 }
    decode_time { seconds: 2 nanos: 250000000 }
    degraded: true
    degraded_reason: "per_token_target"
    target_met: false
    prompt_tokens: 5
    completion_tokens: 32
    drafted_tokens: 30
    accepted_tokens: 21)pb");
}

TEST(UsageJsonTest, HasEveryFieldInSeconds) {
  EXPECT_EQ(ToJson(MixedUsage()), nlohmann::json::parse(R"({
    "prompt_levels": [{"level": 1, "tokens": 5}],
    "completion_levels": [{"level": 3, "tokens": 12}, {"level": 2, "tokens": 20}],
    "mean_relative_cost": 0.625, "mean_relative_flops": 1.25, "flops": 1e9,
    "expected_quality": 0.875,
    "queue_seconds": 0.5, "prefill_seconds": 1.0, "decode_seconds": 2.25,
    "degraded": true, "degraded_reason": "per_token_target", "target_met": false,
    "prompt_tokens": 5, "completion_tokens": 32, "drafted_tokens": 30, "accepted_tokens": 21})"));
}

TEST(UsageJsonTest, NoTargetIsNull) { EXPECT_TRUE(ToJson(v1::Usage())["target_met"].is_null()); }

TEST(UsageJsonTest, AStreamAddsWhatTheClientMeasured) {
  StreamTiming timing;
  EXPECT_TRUE(ToJson(v1::Usage(), timing)["time_to_first_token_seconds"].is_null());
  timing.Record(absl::Milliseconds(250), 1);
  EXPECT_EQ(ToJson(v1::Usage(), timing)["time_to_first_token_seconds"], 0.25);
  EXPECT_TRUE(ToJson(v1::Usage(), timing)["tokens_per_second"].is_null());
  timing.Record(absl::Milliseconds(750), 4);
  EXPECT_EQ(ToJson(v1::Usage(), timing)["tokens_per_second"], 8);
}

std::vector<TokenArrival> ArrivalsAt(const std::vector<int>& milliseconds) {
  std::vector<TokenArrival> arrivals;
  for (const int time : milliseconds) arrivals.push_back({absl::Milliseconds(time), 1});
  return arrivals;
}

TEST(JointTokensPerSecondTest, CountsWhileAllStreamsRun) {
  // From 200 to 400 ms: two tokens of the first stream, one of the second.
  EXPECT_EQ(JointTokensPerSecond({ArrivalsAt({100, 200, 300, 400}), ArrivalsAt({200, 300, 500})}),
            15);
}

TEST(JointTokensPerSecondTest, IsAbsentWhereStreamsDoNotOverlap) {
  EXPECT_EQ(JointTokensPerSecond({ArrivalsAt({100, 200}), ArrivalsAt({200, 300})}), std::nullopt);
  EXPECT_EQ(JointTokensPerSecond({ArrivalsAt({100, 200}), {}}), std::nullopt);
}

TEST(StreamTimingTest, LeavesTheFirstMessageAndEmptyOnesOut) {
  StreamTiming timing;
  timing.Record(absl::Seconds(1), 0);
  timing.Record(absl::Seconds(3), 2);
  timing.Record(absl::Seconds(4), 3);
  timing.Record(absl::Seconds(5), 5);
  timing.Record(absl::Seconds(9), 0);
  EXPECT_EQ(timing.time_to_first_token(), absl::Seconds(3));
  EXPECT_EQ(timing.tokens_per_second(), 4);
}

TEST(UsageLineTest, OneLevelAllAlong) {
  const v1::Usage usage = UsageOf(R"pb(
    prompt_levels { level: 2 tokens: 5 }
    completion_levels { level: 2 tokens: 32 }
    mean_relative_cost: 0.5664
    expected_quality: 0.9438)pb");
  StreamTiming timing;
  timing.Record(absl::Milliseconds(35), 1);
  timing.Record(absl::Milliseconds(1035), 128);
  EXPECT_EQ(UsageLine(usage, timing),
            "level 2 | relative cost 0.566 | expected quality 0.944 | 128.0 tokens/s | "
            "first token 35 ms");
}

TEST(UsageLineTest, LevelsThatChangeDegradationAndTarget) {
  EXPECT_EQ(UsageLine(MixedUsage(), StreamTiming()),
            "levels 3 x12, 2 x20 (prompt: level 1) | relative cost 0.625 | "
            "expected quality 0.875 | 21 of 30 drafted tokens accepted | degraded: "
            "per_token_target | target missed");
}

TEST(UsageLineTest, WithoutACompletionThePromptsLevelCounts) {
  const v1::Usage usage = UsageOf(R"pb(
    prompt_levels { level: 4 tokens: 9 }
    mean_relative_cost: 0.5
    mean_relative_flops: 0.375
    expected_quality: 1
    target_met: true)pb");
  EXPECT_EQ(UsageLine(usage, /*shows_flops=*/true),
            "level 4 | relative cost 0.500 | expected quality 1.000 | relative FLOPs 0.375 | "
            "target met");
}

TEST(MergeTest, WeighsMeansByTokensAndAddsTheRest) {
  const v1::Usage first = UsageOf(R"pb(
    prompt_levels { level: 1 tokens: 30 }
    mean_relative_cost: 0.5
    mean_relative_flops: 0.25
    flops: 10
    expected_quality: 0.5
    prefill_time { nanos: 700000000 }
    target_met: true
    prompt_tokens: 30)pb");
  const v1::Usage second = UsageOf(R"pb(
    prompt_levels { level: 1 tokens: 6 }
    prompt_levels { level: 2 tokens: 4 }
    mean_relative_cost: 1
    mean_relative_flops: 0.75
    flops: 5
    expected_quality: 1
    prefill_time { nanos: 600000000 }
    degraded: true
    degraded_reason: "latency_target"
    target_met: false
    prompt_tokens: 10)pb");
  EXPECT_EQ(Merge({first, second}).DebugString(), UsageOf(R"pb(
                                                    prompt_levels { level: 1 tokens: 36 }
                                                    prompt_levels { level: 2 tokens: 4 }
                                                    mean_relative_cost: 0.625
                                                    mean_relative_flops: 0.375
                                                    flops: 15
                                                    expected_quality: 0.625
                                                    queue_time {}
                                                    prefill_time { seconds: 1 nanos: 300000000 }
                                                    decode_time {}
                                                    degraded: true
                                                    degraded_reason: "latency_target"
                                                    target_met: false
                                                    prompt_tokens: 40)pb")
                                                      .DebugString());
}

TEST(MergeTest, TargetsAreMetIfAllAreAndAbsentIfNoneWasGiven) {
  v1::Usage met, missed, none;
  met.set_target_met(true);
  missed.set_target_met(false);
  EXPECT_TRUE(Merge({met, none, met}).target_met());
  EXPECT_FALSE(Merge({missed, met}).target_met());
  EXPECT_FALSE(Merge({none, none}).has_target_met());
}

TEST(FinishReasonTest, HasAName) {
  EXPECT_EQ(NameOf(v1::FINISH_REASON_STOP), "stop");
  EXPECT_EQ(NameOf(v1::FINISH_REASON_LENGTH), "length");
  EXPECT_EQ(NameOf(v1::FINISH_REASON_DRAIN), "drain");
}

}  // namespace
}  // namespace nestor
