// The client's commands against a daemon that serves an artifact made by `nestor compress`.

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/end_to_end/daemon.h"
#include "tests/end_to_end/program.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using Json = nlohmann::json;

// The object that a command printed; null, and a failure, where it did not succeed.
Json JsonOf(const ProgramResult& result) {
  EXPECT_EQ(result.exit_code, 0) << result.err;
  if (result.exit_code != 0) return nullptr;
  Json json = Json::parse(result.out, nullptr, /*allow_exceptions=*/false);
  EXPECT_TRUE(json.is_object()) << result.out;
  return json;
}

void ExpectFailure(const ProgramResult& result, const std::string& code,
                   const std::string& message) {
  EXPECT_EQ(result.exit_code, 1) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr(code + ": "), HasSubstr(message)));
}

// Checkpoint -> compress -> daemon, once for all tests of a suite.
class Served {
 public:
  static absl::StatusOr<std::unique_ptr<Served>> Make(bool is_encoder) {
    auto served = std::make_unique<Served>();
    const std::string root = served->directory_.path();
    const absl::Status written =
        is_encoder ? WriteTinyBert(root + "/source") : WriteTinyLlama(root + "/source");
    if (!written.ok()) return written;
    const absl::Status prose = WriteProse(root + "/prose.txt", 40000);
    if (!prose.ok()) return prose;
    const ProgramResult compressed =
        RunNestor({"compress", root + "/source", root + "/nested", "--calibration",
                   root + "/prose.txt", "--calibration-tokens", "4096", "--evaluation-tokens",
                   "1024", "--levels", "3", "--ladder", is_encoder ? "prefix" : "both"});
    if (compressed.exit_code != 0) return absl::InternalError(compressed.err);
    auto daemon = Daemon::Start(root + "/nested", {"engine.max_sequences=8"});
    if (!daemon.ok()) return daemon.status();
    served->daemon_ = *std::move(daemon);
    served->model_ = JsonOf(served->daemon_->Run({"levels", "--json"}));
    return served;
  }

  const std::string& directory() const { return directory_.path(); }
  const Daemon& daemon() const { return *daemon_; }
  const Json& levels() const { return model_["levels"]; }
  const Json& model() const { return model_; }

 private:
  TemporaryDirectory directory_;
  std::unique_ptr<Daemon> daemon_;
  Json model_;
};

class LanguageModelTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto served = Served::Make(/*is_encoder=*/false);
    ASSERT_TRUE(served.ok()) << served.status();
    served_ = served->release();
  }
  static void TearDownTestSuite() {
    delete served_;
    served_ = nullptr;
  }
  void SetUp() override { ASSERT_NE(served_, nullptr) << "the daemon did not start"; }

  static ProgramResult Run(const std::vector<std::string>& arguments) {
    return served_->daemon().Run(arguments);
  }
  static Json Generate(const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"generate", "Once upon a time", "--json", "--ignore-eos"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return JsonOf(Run(arguments));
  }

  static Served* served_;
};
Served* LanguageModelTest::served_ = nullptr;

TEST_F(LanguageModelTest, LevelsHaveTheirDocumentedKeysAndEndInTheFullOne) {
  const Json& levels = served_->levels();
  ASSERT_GE(levels.size(), 3u);
  for (const Json& level : levels) {
    for (const char* key : {"level", "form", "relative_cost", "relative_flops", "perplexity",
                            "quality", "tokens_per_second"}) {
      ASSERT_TRUE(level.contains(key)) << key;
    }
    EXPECT_GT(level["tokens_per_second"], 0);
    EXPECT_GT(level["perplexity"], 1);
  }
  EXPECT_EQ(levels.back()["form"], "full");
  EXPECT_EQ(levels.back()["relative_cost"], 1);
  EXPECT_EQ(levels.front()["level"], 0);
  EXPECT_LT(levels.front()["relative_cost"], 1);
}

TEST_F(LanguageModelTest, TheTableListsEveryLevel) {
  const ProgramResult result = Run({"levels"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("relative cost"), HasSubstr("full")));
  EXPECT_EQ(std::count(result.out.begin(), result.out.end(), '\n'),
            static_cast<int64_t>(served_->levels().size()) + 2);
}

TEST_F(LanguageModelTest, EveryPinnedLevelRunsAndRepeatsItsTextWithAndWithoutSpeculation) {
  for (const Json& level : served_->levels()) {
    SCOPED_TRACE(level.dump());
    std::vector<std::string> flags = {
        "--level", level["level"].dump(), "--seed", "7", "--temperature", "0.9", "--max-tokens",
        "24",      "--speculate=false"};
    const Json first = Generate(flags);
    flags.back() = "--speculate";
    const Json second = Generate(flags);
    ASSERT_TRUE(first.is_object() && second.is_object());
    EXPECT_EQ(first["text"], second["text"]);
    EXPECT_EQ(first["tokens"], second["tokens"]);
    EXPECT_EQ(first["tokens"].size(), 24u);
    EXPECT_EQ(first["finish_reason"], "length");
    const Json& usage = first["usage"];
    EXPECT_EQ(usage["completion_levels"], Json({{{"level", level["level"]}, {"tokens", 24}}}));
    EXPECT_EQ(usage["prompt_levels"],
              Json({{{"level", level["level"]}, {"tokens", usage["prompt_tokens"]}}}));
    EXPECT_NEAR(usage["mean_relative_cost"], level["relative_cost"], 1e-9);
    EXPECT_NEAR(usage["expected_quality"], level["quality"], 1e-9);
    EXPECT_EQ(usage["prompt_tokens"], 16);
    EXPECT_EQ(usage["completion_tokens"], 24);
    EXPECT_EQ(usage["drafted_tokens"], 0);
    EXPECT_NEAR(second["usage"]["expected_quality"], level["quality"], 1e-9);
    EXPECT_GT(usage["flops"], 0);
    EXPECT_GT(usage["time_to_first_token_seconds"], 0);
    EXPECT_EQ(usage["degraded"], false);
    EXPECT_TRUE(usage["target_met"].is_null());
  }
}

TEST_F(LanguageModelTest, AnotherSeedGivesAnotherText) {
  const std::vector<std::string> flags = {"--temperature", "0.9", "--max-tokens", "24", "--seed"};
  std::vector<std::string> seed_1 = flags, seed_2 = flags;
  seed_1.push_back("1");
  seed_2.push_back("2");
  EXPECT_NE(Generate(seed_1)["tokens"], Generate(seed_2)["tokens"]);
}

// The best level at most `max_cost` dear. A level that does better than the full one is no better
// than full, and of equals the costlier is taken. (Cuts flatter a model with random weights.)
int BestLevel(const Json& levels, double max_cost) {
  const auto rank = [](const Json& level) {
    return std::pair(std::min<double>(1, level["quality"]), level["relative_cost"].get<double>());
  };
  const Json* best = nullptr;
  for (const Json& level : levels) {
    if (level["relative_cost"] > max_cost) continue;
    if (best == nullptr || rank(level) > rank(*best)) best = &level;
  }
  return best == nullptr ? -1 : (*best)["level"].get<int>();
}

TEST_F(LanguageModelTest, WithoutABudgetTheBestLevelRuns) {
  const Json reply = Generate({"--max-tokens", "8"});
  ASSERT_TRUE(reply.is_object());
  EXPECT_EQ(reply["usage"]["completion_levels"],
            Json({{{"level", BestLevel(served_->levels(), 1)}, {"tokens", 8}}}));
}

TEST_F(LanguageModelTest, MaxCostRunsTheBestLevelWithin) {
  for (const Json& ceiling : served_->levels()) {
    const double max_cost = ceiling["relative_cost"];
    const Json reply =
        Generate({"--max-tokens", "8", "--max-cost", absl::StrFormat("%.17g", max_cost)});
    ASSERT_TRUE(reply.is_object());
    EXPECT_LE(reply["usage"]["mean_relative_cost"], max_cost + 1e-9);
    EXPECT_EQ(reply["usage"]["completion_levels"],
              Json({{{"level", BestLevel(served_->levels(), max_cost)}, {"tokens", 8}}}));
  }
}

TEST_F(LanguageModelTest, ABudgetThatNoLevelMeetsIsRefused) {
  ExpectFailure(Run({"generate", "hello", "--max-cost", "0.001"}), "FAILED_PRECONDITION", "level");
  double cheapest = 1;
  for (const Json& level : served_->levels()) {
    cheapest = std::min<double>(cheapest, level["relative_cost"]);
  }
  ExpectFailure(Run({"generate", "hello", "--max-cost", absl::StrFormat("%.6f", cheapest - 1e-3),
                     "--min-quality", "0.01"}),
                "FAILED_PRECONDITION", "level");
}

TEST_F(LanguageModelTest, BudgetsThatMakeNoSenseAreNamed) {
  ExpectFailure(Run({"generate", "hello", "--max-cost", "nan"}), "INVALID_ARGUMENT", "max_cost");
  ExpectFailure(Run({"generate", "hello", "--max-cost", "-0.5"}), "INVALID_ARGUMENT", "max_cost");
  ExpectFailure(Run({"generate", "hello", "--min-quality", "1.5"}), "INVALID_ARGUMENT",
                "min_quality");
  ExpectFailure(Run({"generate", "hello", "--level", "99"}), "INVALID_ARGUMENT", "99");
  ExpectFailure(Run({"generate", "hello", "--level", "-1"}), "INVALID_ARGUMENT", "-1");
  ExpectFailure(Run({"generate", "hello", "--per-token-target", "-5ms"}), "INVALID_ARGUMENT",
                "per_token_target");
}

TEST_F(LanguageModelTest, AnAimThatIsEasilyMetIsReportedAsMet) {
  const Json reply = Generate({"--max-tokens", "4", "--latency-target", "2m"});
  ASSERT_TRUE(reply.is_object());
  EXPECT_EQ(reply["usage"]["target_met"], true);
  EXPECT_EQ(reply["usage"]["degraded"], false);
}

TEST_F(LanguageModelTest, TextGoesToStdoutAndUsageToStderr) {
  const std::vector<std::string> arguments = {"generate", "Hello",        "--max-tokens",
                                              "12",       "--ignore-eos", "--speculate=false"};
  const ProgramResult plain = Run(arguments);
  EXPECT_EQ(plain.exit_code, 0) << plain.err;
  std::vector<std::string> with_json = arguments;
  with_json.push_back("--json");
  EXPECT_EQ(plain.out, JsonOf(Run(with_json))["text"].get<std::string>() + "\n");
  EXPECT_THAT(plain.err, AllOf(HasSubstr("level "), HasSubstr("relative cost 1.000"),
                               HasSubstr("expected quality 1.000"), HasSubstr("tokens/s"),
                               HasSubstr("first token ")));
}

TEST_F(LanguageModelTest, ChatSetsTheMessagesInTheTemplate) {
  const Json chat = JsonOf(Run({"generate", "--chat", "--system", "Be brief.", "Hello",
                                "--max-tokens", "4", "--json", "--ignore-eos"}));
  const Json text = JsonOf(Run({"generate",
                                "<|im_start|>system\nBe brief.<|im_end|>\n"
                                "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
                                "--max-tokens", "4", "--json", "--ignore-eos"}));
  ASSERT_TRUE(chat.is_object() && text.is_object());
  EXPECT_EQ(chat["tokens"], text["tokens"]);
  EXPECT_EQ(chat["usage"]["prompt_tokens"], text["usage"]["prompt_tokens"]);
}

TEST_F(LanguageModelTest, AStopStringEndsTheTextBeforeIt) {
  const Json whole = Generate({"--max-tokens", "40"});
  ASSERT_TRUE(whole.is_object());
  const std::string text = whole["text"];
  // A character in the middle that is a whole one by itself.
  const size_t at = text.find_first_of(
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-*/<>!#$%&()=", 1);
  ASSERT_NE(at, std::string::npos) << "the text has no printable character: " << text;
  const Json cut = Generate({"--max-tokens", "40", "--stop", text.substr(at, 1)});
  ASSERT_TRUE(cut.is_object());
  EXPECT_EQ(cut["finish_reason"], "stop");
  EXPECT_EQ(cut["text"], text.substr(0, text.find(text[at])));
}

TEST_F(LanguageModelTest, PromptsThatDoNotFitAreRefusedOrCut) {
  const std::string file = served_->directory() + "/long.txt";
  ASSERT_TRUE(WriteFileAtomically(file, std::string(300, 'x')).ok());
  ExpectFailure(Run({"generate", "--prompt-file", file, "--max-tokens", "4"}), "INVALID_ARGUMENT",
                "300");
  const Json cut = JsonOf(Run({"generate", "--prompt-file", file, "--max-tokens", "4", "--truncate",
                               "--json", "--ignore-eos"}));
  ASSERT_TRUE(cut.is_object());
  EXPECT_EQ(cut["usage"]["completion_tokens"], 4);
  EXPECT_LT(cut["usage"]["prompt_tokens"], 256);
}

TEST_F(LanguageModelTest, BadRequestsAreNamed) {
  ExpectFailure(Run({"generate", ""}), "INVALID_ARGUMENT", "prompt");
  ExpectFailure(Run({"generate", "caf\xe9"}), "INVALID_ARGUMENT", "not UTF-8");
  ExpectFailure(Run({"generate", "hello", "--max-tokens", "0"}), "INVALID_ARGUMENT", "max_tokens");
  ExpectFailure(Run({"generate", "hello", "--temperature", "-1"}), "INVALID_ARGUMENT",
                "temperature");
  ExpectFailure(Run({"generate", "hello", "--top-p", "0"}), "INVALID_ARGUMENT", "top_p");
  ExpectFailure(Run({"embed", "hello"}), "FAILED_PRECONDITION", "language model");
}

TEST_F(LanguageModelTest, TheCommandLineIsCheckedFirst) {
  const ProgramResult unknown = Run({"generate", "hello", "--colour", "red"});
  EXPECT_EQ(unknown.exit_code, 2);
  EXPECT_THAT(unknown.err, HasSubstr("unknown flag --colour"));
  EXPECT_EQ(RunNestor({"generat"}).exit_code, 2);
  for (const char* command :
       {"compress", "evaluate", "generate", "score", "embed", "levels", "health", "bench"}) {
    const ProgramResult help = RunNestor({"help", command});
    EXPECT_EQ(help.exit_code, 0) << help.err;
    EXPECT_THAT(help.out, HasSubstr(absl::StrCat("Example:\n  nestor ", command))) << command;
  }
}

TEST_F(LanguageModelTest, ScoreGivesEveryTokenButTheFirstItsLogProbability) {
  const std::string text = "the old stone bridge";
  const Json scores = JsonOf(Run({"score", text, "--json"}));
  ASSERT_TRUE(scores.is_object());
  ASSERT_EQ(scores["tokens"].size(), text.size());
  ASSERT_EQ(scores["log_probabilities"].size(), text.size() - 1);
  double sum = 0;
  for (const Json& value : scores["log_probabilities"]) {
    EXPECT_LT(value, 0);
    sum += value.get<double>();
  }
  EXPECT_NEAR(scores["perplexity"], std::exp(-sum / static_cast<double>(text.size() - 1)), 1e-6);
  EXPECT_EQ(scores["usage"]["prompt_tokens"], text.size());
}

TEST_F(LanguageModelTest, ScoresDependOnTheLevel) {
  const Json cheap = JsonOf(Run({"score", "the old stone bridge", "--json", "--level", "0"}));
  // Which level is the best of a model with random weights is a matter of chance.
  const std::string last = absl::StrCat(served_->levels().size() - 1);
  const Json full = JsonOf(Run({"score", "the old stone bridge", "--json", "--level", last}));
  ASSERT_TRUE(cheap.is_object() && full.is_object());
  EXPECT_NE(cheap["log_probabilities"], full["log_probabilities"]);
  EXPECT_EQ(cheap["usage"]["prompt_levels"][0]["level"], 0);
}

TEST_F(LanguageModelTest, AnElapsedTimeoutIsDeadlineExceeded) {
  ExpectFailure(Run({"generate", "hello", "--timeout", "1us"}), "DEADLINE_EXCEEDED", "");
}

TEST_F(LanguageModelTest, HealthIsServing) {
  EXPECT_EQ(Run({"health"}).exit_code, 0);
  EXPECT_EQ(Run({"health", "--wait", "10s"}).exit_code, 0);
  ExpectFailure(Run({"health", "--service", "nobody"}), "NOT_FOUND", "");
}

TEST_F(LanguageModelTest, MetricsCountWhatRan) {
  const absl::StatusOr<double> before = served_->daemon().Metric("nestor_generation_tokens_total");
  ASSERT_TRUE(before.ok()) << before.status();
  ASSERT_TRUE(Generate({"--max-tokens", "8"}).is_object());
  const absl::StatusOr<double> after = served_->daemon().Metric("nestor_generation_tokens_total");
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(*after - *before, 8);
}

TEST_F(LanguageModelTest, EvaluateAgreesWithTheServedLevels) {
  const std::string root = served_->directory();
  const Json evaluated = JsonOf(RunNestor(
      {"evaluate", root + "/nested", "--text", root + "/prose.txt", "--tokens", "1024", "--json"}));
  ASSERT_TRUE(evaluated.is_object());
  ASSERT_EQ(evaluated["levels"].size(), served_->levels().size());
  for (size_t i = 0; i < served_->levels().size(); ++i) {
    const Json& level = evaluated["levels"][i];
    for (const char* key :
         {"level", "form", "relative_cost", "relative_flops", "perplexity", "quality"}) {
      ASSERT_TRUE(level.contains(key)) << key;
    }
    EXPECT_EQ(level["form"], served_->levels()[i]["form"]);
    EXPECT_NEAR(level["relative_cost"], served_->levels()[i]["relative_cost"], 1e-9);
  }
}

TEST_F(LanguageModelTest, SeveralClientsGiveTheirJointSpeed) {
  const Json reply = Generate({"--clients", "3", "--max-tokens", "32", "--level", "0"});
  ASSERT_TRUE(reply.is_object());
  EXPECT_EQ(reply["clients"], 3);
  EXPECT_EQ(reply["usage"]["completion_tokens"], 96);
  // Null where one stream was over before another began, which a model as small as this allows.
  EXPECT_TRUE(reply.contains("tokens_per_second"));
  EXPECT_EQ(Run({"generate", "hello", "--clients", "0"}).exit_code, 2);
}

TEST_F(LanguageModelTest, BenchMeasuresEveryLevel) {
  const Json bench =
      JsonOf(RunNestor({"bench", served_->directory() + "/nested", "--rows", "1,2", "--tokens", "4",
                        "--prompt-tokens", "32", "--rounds", "1", "--threads", "1", "--json"}));
  ASSERT_TRUE(bench.is_object());
  const size_t num_levels = served_->levels().size();
  EXPECT_FALSE(bench["cpu"].get<std::string>().empty());
  EXPECT_EQ(bench["threads"], 1);
  EXPECT_GT(bench["read_gbps"], 0);
  EXPECT_GT(bench["gemm_gflops"], 0);
  ASSERT_EQ(bench["decode"].size(), 2 * num_levels);
  for (const Json& row : bench["decode"]) {
    EXPECT_GT(row["tokens_per_second"], 0);
    EXPECT_GT(row["weight_gbps"], 0);
    EXPECT_TRUE(row.contains("level") && row.contains("rows"));
    for (const char* key : {"seconds", "flops", "weight_bytes"}) EXPECT_GT(row[key], 0) << key;
  }
  ASSERT_EQ(bench["prefill"].size(), num_levels);
  for (const Json& row : bench["prefill"]) {
    EXPECT_EQ(row["tokens"], 32);
    EXPECT_GT(row["tokens_per_second"], 0);
    EXPECT_GT(row["flops"], 0);
  }
  ASSERT_EQ(bench["mixed"].size(), 4u);
  for (const Json& row : bench["mixed"]) {
    EXPECT_EQ(row["rows"], row["levels"].size());
    EXPECT_FALSE(row["rows_by_executed_level"].empty());
    for (const char* key : {"seconds", "seconds_as_asked", "seconds_raised"})
      EXPECT_GT(row[key], 0) << key;
  }
}

TEST_F(LanguageModelTest, BenchMeasuresSpeculation) {
  const std::string prompts = served_->directory() + "/prompts.txt";
  ASSERT_TRUE(WriteFileAtomically(prompts, "a river runs\nseven birds sing\n").ok());
  const Json bench =
      JsonOf(RunNestor({"bench", served_->directory() + "/nested", "--speculate", "--prompts",
                        prompts, "--tokens", "8", "--rounds", "1", "--threads", "1", "--json"}));
  ASSERT_TRUE(bench.is_object());
  const Json& speculation = bench["speculation"];
  EXPECT_GE(speculation["drafts"], 1);
  EXPECT_LT(speculation["draft_level"], speculation["verify_level"]);
  EXPECT_GT(speculation["draft_time"], 0);
  EXPECT_GT(speculation["expected_gain"], 0);
  EXPECT_GT(speculation["gain"], 0);
  EXPECT_TRUE(bench["decode"].empty());
  // A command line that is wrong in itself.
  EXPECT_EQ(RunNestor({"bench", served_->directory() + "/nested", "--speculate"}).exit_code, 2);
}

class EncoderTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto served = Served::Make(/*is_encoder=*/true);
    ASSERT_TRUE(served.ok()) << served.status();
    served_ = served->release();
  }
  static void TearDownTestSuite() {
    delete served_;
    served_ = nullptr;
  }
  void SetUp() override { ASSERT_NE(served_, nullptr) << "the daemon did not start"; }

  static ProgramResult Run(const std::vector<std::string>& arguments) {
    return served_->daemon().Run(arguments);
  }

  static Served* served_;
};
Served* EncoderTest::served_ = nullptr;

TEST_F(EncoderTest, LevelsHaveASpearmanInsteadOfAPerplexity) {
  EXPECT_EQ(served_->model()["is_encoder"], true);
  ASSERT_GE(served_->levels().size(), 2u);
  for (const Json& level : served_->levels()) {
    EXPECT_TRUE(level.contains("spearman"));
    EXPECT_FALSE(level.contains("perplexity"));
  }
}

TEST_F(EncoderTest, EveryLevelEmbedsToUnitLength) {
  for (const Json& level : served_->levels()) {
    SCOPED_TRACE(level.dump());
    const Json reply = JsonOf(Run(
        {"embed", "a river runs", "seven birds sing", "--json", "--level", level["level"].dump()}));
    ASSERT_TRUE(reply.is_object());
    ASSERT_EQ(reply["embeddings"].size(), 2u);
    for (const Json& embedding : reply["embeddings"]) {
      ASSERT_EQ(embedding.size(), served_->model()["embedding_size"]);
      double square = 0;
      for (const Json& value : embedding) square += value.get<double>() * value.get<double>();
      EXPECT_NEAR(square, 1, 1e-4);
    }
    EXPECT_NE(reply["embeddings"][0], reply["embeddings"][1]);
    for (const Json& run : reply["usage"]["prompt_levels"]) EXPECT_EQ(run["level"], level["level"]);
    EXPECT_NEAR(reply["usage"]["mean_relative_flops"], level["relative_flops"], 1e-9);
  }
}

TEST_F(EncoderTest, PairsGiveTheirSimilarity) {
  const Json reply = JsonOf(Run({"embed", "--pairs", "--json", "a river runs", "a river runs",
                                 "a river runs", "seven birds sing"}));
  ASSERT_TRUE(reply.is_object());
  ASSERT_EQ(reply["similarities"].size(), 2u);
  EXPECT_NEAR(reply["similarities"][0], 1, 1e-4);
  EXPECT_LT(reply["similarities"][1], 0.9999);
  EXPECT_GT(reply["sentences_per_second"], 0);
}

TEST_F(EncoderTest, AFileIsEmbeddedInSeveralRequests) {
  const std::string file = served_->directory() + "/lines.txt";
  ASSERT_TRUE(WriteFileAtomically(file, "a river\nseven birds\nan old bridge\n").ok());
  const Json batched = JsonOf(Run({"embed", "--file", file, "--batch", "2", "--json"}));
  const Json at_once = JsonOf(Run({"embed", "--file", file, "--json"}));
  ASSERT_TRUE(batched.is_object() && at_once.is_object());
  ASSERT_EQ(batched["embeddings"].size(), 3u);
  EXPECT_EQ(batched["usage"]["prompt_tokens"], at_once["usage"]["prompt_tokens"]);
  // Not equal: kernels for few rows round their inputs, those for many rows do not.
  for (size_t text = 0; text < 3; ++text) {
    const auto a = batched["embeddings"][text].get<std::vector<double>>();
    const auto b = at_once["embeddings"][text].get<std::vector<double>>();
    EXPECT_GT(std::inner_product(a.begin(), a.end(), b.begin(), 0.0), 0.999);
  }
}

TEST_F(EncoderTest, MaxCostBoundsRelativeFlops) {
  const double max_cost = served_->levels()[0]["relative_flops"];
  const Json reply =
      JsonOf(Run({"embed", "a river", "--json", "--max-cost", absl::StrFormat("%.17g", max_cost)}));
  ASSERT_TRUE(reply.is_object());
  EXPECT_LE(reply["usage"]["mean_relative_flops"], max_cost + 1e-9);
  ExpectFailure(Run({"embed", "a river", "--max-cost", "0.0001"}), "FAILED_PRECONDITION", "level");
}

TEST_F(EncoderTest, WhatAnEncoderCannotDoIsRefused) {
  ExpectFailure(Run({"generate", "hello"}), "FAILED_PRECONDITION", "encoder");
  ExpectFailure(Run({"score", "hello"}), "FAILED_PRECONDITION", "encoder");
}

TEST_F(EncoderTest, BenchMeasuresSentences) {
  const Json bench = JsonOf(RunNestor(
      {"bench", served_->directory() + "/nested", "--rounds", "1", "--threads", "1", "--json"}));
  ASSERT_TRUE(bench.is_object());
  ASSERT_EQ(bench["embed"].size(), served_->levels().size());
  EXPECT_EQ(bench["embed"][0]["batch"], 32);
  EXPECT_EQ(bench["embed"][0]["sentences"], 32);
  EXPECT_EQ(bench["embed"][0]["tokens"], 32 * 16);
  EXPECT_GT(bench["embed"][0]["sentences_per_second"], 0);
}

TEST_F(EncoderTest, BenchMeasuresTheLinesOfAFileAtEveryBatch) {
  const std::string path = served_->directory() + "/sentences.txt";
  ASSERT_TRUE(WriteFileAtomically(path, "a river\n\nan old bridge\nstone\n").ok());
  const Json bench =
      JsonOf(RunNestor({"bench", served_->directory() + "/nested", "--rounds", "1", "--threads",
                        "1", "--levels", "0", "--texts", path, "--batch", "1,2", "--json"}));
  ASSERT_TRUE(bench.is_object());
  ASSERT_EQ(bench["embed"].size(), 2u);
  EXPECT_EQ(bench["embed"][0]["batch"], 1);
  EXPECT_EQ(bench["embed"][1]["batch"], 2);
  for (const Json& row : bench["embed"]) {
    EXPECT_EQ(row["sentences"], 3);
    // Single characters, and two special tokens each.
    EXPECT_EQ(row["tokens"], 6 + 11 + 5 + 3 * 2);
    EXPECT_GT(row["sentences_per_second"], 0);
  }
  ExpectFailure(RunNestor({"bench", served_->directory() + "/nested", "--texts", "/absent"}),
                "NOT_FOUND", "/absent");
}

}  // namespace
}  // namespace nestor
