// What keeps a daemon from starting, and what it says then.

#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/end_to_end/daemon.h"
#include "tests/end_to_end/http.h"
#include "tests/end_to_end/program.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr absl::Duration kLimit = absl::Minutes(2);

// The message of a nestord that must not start, without its log, which shows every setting.
std::string FailureOf(const std::vector<std::string>& arguments) {
  const auto program = Program::Start(NESTORD_PROGRAM, arguments);
  EXPECT_TRUE(program.ok()) << program.status();
  if (!program.ok()) return "";
  const auto result = (*program)->Wait(kLimit);
  EXPECT_TRUE(result.ok()) << result.status();
  if (!result.ok()) return "";
  EXPECT_EQ(result->exit_code, 1) << result->err;
  const size_t message = result->err.rfind("nestord: ");
  EXPECT_NE(message, std::string::npos) << result->err;
  return message == std::string::npos ? "" : result->err.substr(message);
}

class StartTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = new TemporaryDirectory();
    const std::string root = directory_->path();
    ASSERT_TRUE(WriteTinyLlama(root + "/source").ok());
    ASSERT_TRUE(WriteProse(root + "/prose.txt", 20000).ok());
    const ProgramResult compressed = RunNestor(
        {"compress", root + "/source", root + "/nested", "--calibration", root + "/prose.txt",
         "--calibration-tokens", "2048", "--evaluation-tokens", "1024", "--levels", "2"});
    ASSERT_EQ(compressed.exit_code, 0) << compressed.err;
  }
  static void TearDownTestSuite() {
    delete directory_;
    directory_ = nullptr;
  }
  // A copy to damage.
  void SetUp() override {
    ASSERT_TRUE(std::filesystem::exists(directory_->path() + "/nested/nested.json"));
    artifact_ = directory_->path() + "/copy";
    std::filesystem::remove_all(artifact_);
    std::filesystem::copy(directory_->path() + "/nested", artifact_,
                          std::filesystem::copy_options::recursive);
  }

  std::string Tensors() const { return artifact_ + "/nested.safetensors"; }
  std::string Failure() const {
    return FailureOf({"--model", artifact_, "--listen", "127.0.0.1:0", "--set", "metrics.listen="});
  }

  static TemporaryDirectory* directory_;
  std::string artifact_;
};
TemporaryDirectory* StartTest::directory_ = nullptr;

TEST_F(StartTest, AnExtraCostServesLikeAnyLevelAndIsMarked) {
  const auto daemon = Daemon::Start(artifact_, {"engine.extra_costs=0.95"});
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  const ProgramResult table = (*daemon)->Run({"levels"});
  EXPECT_THAT(table.out, HasSubstr("residual, interpolated"));
  const auto levels =
      nlohmann::json::parse((*daemon)->Run({"levels", "--json"}).out, nullptr, false)["levels"];
  int found = 0;
  for (size_t i = 1; i + 1 < levels.size(); ++i) {
    if (levels[i]["interpolated"] == false) continue;
    ++found;
    EXPECT_GT(levels[i]["relative_cost"], levels[i - 1]["relative_cost"]);
    EXPECT_LE(levels[i]["relative_cost"], 0.95);
    EXPECT_EQ(levels[i]["perplexity"], nullptr);
    EXPECT_GT(levels[i]["tokens_per_second"], 0);
    const ProgramResult reply =
        (*daemon)->Run({"generate", "Once", "--level", std::to_string(i), "--max-tokens", "4",
                        "--ignore-eos", "--speculate=false", "--json"});
    ASSERT_EQ(reply.exit_code, 0) << reply.err;
    const auto usage = nlohmann::json::parse(reply.out)["usage"];
    EXPECT_EQ(usage["completion_levels"], nlohmann::json({{{"level", i}, {"tokens", 4}}}));
    EXPECT_NEAR(usage["expected_quality"], levels[i]["quality"], 1e-9);
  }
  EXPECT_EQ(found, 1);
}

TEST_F(StartTest, AnExtraCostThatCannotBeIsNamed) {
  const auto failure = [&](const std::string& costs) {
    return FailureOf({"--model", artifact_, "--listen", "127.0.0.1:0", "--set",
                      "metrics.listen=", "--set", "engine.extra_costs=" + costs});
  };
  EXPECT_THAT(failure("1.5"), HasSubstr("engine.extra_costs: must be a share in (0, 1)"));
  EXPECT_THAT(failure("0.01"), HasSubstr("engine.extra_costs: residual:0.01: must be between"));
  EXPECT_THAT(failure("0.9,0.9"), HasSubstr("residual:0.9: is there twice"));
}

TEST_F(StartTest, AClassifierHasNoRpc) {
  EXPECT_THAT(
      FailureOf({"--model", NESTOR_SOURCE_DIR "/tests/data/transformers/tiny_bert_classifier",
                 "--listen", "127.0.0.1:0", "--set", "metrics.listen="}),
      HasSubstr("BertForSequenceClassification has labels, which no RPC serves"));
}

TEST_F(StartTest, ABusyPortIsNamed) {
  const TakenPort taken;
  const std::string address = absl::StrCat("127.0.0.1:", taken.port());
  EXPECT_THAT(FailureOf({"--model", artifact_, "--listen", address, "--set", "metrics.listen="}),
              HasSubstr(address));
}

TEST_F(StartTest, ABusyMetricsPortIsNamed) {
  const TakenPort taken;
  const std::string address = absl::StrCat("127.0.0.1:", taken.port());
  EXPECT_THAT(FailureOf({"--model", artifact_, "--listen", "127.0.0.1:0", "--set",
                         "metrics.listen=" + address}),
              HasSubstr(address));
}

TEST_F(StartTest, ADamagedTensorIsNamed) {
  absl::StatusOr<std::string> bytes = ReadFile(Tensors());
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  // safetensors: the header's length in 8 bytes, the header, then the tensors.
  uint64_t header_size = 0;
  std::memcpy(&header_size, bytes->data(), sizeof(header_size));
  const auto header = nlohmann::json::parse(bytes->substr(8, header_size));
  const std::string tensor = "model.layers.1.mlp.down_proj.coarse";
  ASSERT_TRUE(header.contains(tensor)) << header.dump();
  const size_t offset = 8 + header_size + header[tensor]["data_offsets"][0].get<size_t>();
  bytes->at(offset + 5) = static_cast<char>(bytes->at(offset + 5) ^ 0x10);
  ASSERT_TRUE(WriteFileAtomically(Tensors(), *bytes).ok());
  EXPECT_THAT(Failure(), AllOf(HasSubstr("nested.safetensors"), HasSubstr(tensor)));
}

TEST_F(StartTest, ATruncatedFileIsNamed) {
  std::filesystem::resize_file(Tensors(), std::filesystem::file_size(Tensors()) - 100);
  EXPECT_THAT(Failure(), HasSubstr("nested.safetensors"));
}

TEST_F(StartTest, AMissingFileIsNamed) {
  std::filesystem::remove(Tensors());
  EXPECT_THAT(Failure(), HasSubstr("nested.safetensors"));
}

TEST_F(StartTest, AMissingTokenizerIsNamed) {
  std::filesystem::remove(artifact_ + "/tokenizer.json");
  EXPECT_THAT(Failure(), HasSubstr("tokenizer.json"));
}

TEST_F(StartTest, AnUnknownArchitectureIsNamed) {
  absl::StatusOr<std::string> config = ReadFile(artifact_ + "/config.json");
  ASSERT_TRUE(config.ok()) << config.status();
  nlohmann::json json = nlohmann::json::parse(*config);
  json["architectures"] = {"MambaForCausalLM"};
  ASSERT_TRUE(WriteFileAtomically(artifact_ + "/config.json", json.dump()).ok());
  EXPECT_THAT(Failure(), AllOf(HasSubstr("config.json"), HasSubstr("MambaForCausalLM")));
}

TEST_F(StartTest, EveryBadKeyIsReportedAtOnce) {
  const std::string config = directory_->path() + "/bad.yaml";
  ASSERT_TRUE(WriteFileAtomically(config,
                                  "scheduler:\n  max_queue: -3\n  colour: red\n"
                                  "engine:\n  page_size: many\n")
                  .ok());
  EXPECT_THAT(FailureOf({"--config", config, "--model", artifact_}),
              AllOf(HasSubstr("scheduler.max_queue"), HasSubstr("-3"),
                    HasSubstr("scheduler.colour"), HasSubstr("engine.page_size")));
}

TEST_F(StartTest, AnUnknownFlagIsNamed) {
  EXPECT_THAT(FailureOf({"--colour", "red"}), HasSubstr("--colour"));
}

TEST_F(StartTest, CompressDoesNotReplaceWhatIsThere) {
  const std::string root = directory_->path();
  const ProgramResult again = RunNestor(
      {"compress", root + "/source", root + "/nested", "--calibration", root + "/prose.txt"});
  EXPECT_EQ(again.exit_code, 1);
  EXPECT_THAT(again.err, AllOf(HasSubstr("ALREADY_EXISTS"), HasSubstr(root + "/nested")));
}

TEST_F(StartTest, CompressNeedsEnoughText) {
  const std::string root = directory_->path();
  ASSERT_TRUE(WriteFileAtomically(root + "/short.txt", "too short\n").ok());
  const ProgramResult result = RunNestor(
      {"compress", root + "/source", root + "/other", "--calibration", root + "/short.txt"});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr("INVALID_ARGUMENT"), HasSubstr("short")));
  EXPECT_FALSE(std::filesystem::exists(root + "/other"));
}

}  // namespace
}  // namespace nestor
