// Streams that end before their time: clients that go away, and a daemon that is told to stop.

#include <signal.h>

#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/end_to_end/daemon.h"
#include "tests/end_to_end/program.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr absl::Duration kLimit = absl::Minutes(2);
// Far more tokens than a test waits for: what ends such a stream is never its length.
constexpr int64_t kEndless = 200000;

class StreamTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTinyLlama(directory_.path(), {.context_length = kEndless}).ok());
  }

  void StartDaemon(const std::vector<std::string>& settings) {
    auto daemon = Daemon::Start(directory_.path(), settings);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
  }

  // A client whose first text has arrived.
  std::unique_ptr<Program> StartStream(const std::string& max_tokens) {
    auto client = Program::Start(
        NESTOR_PROGRAM,
        daemon_->Arguments({"generate", "Once upon a time", "--ignore-eos", "--temperature", "0.9",
                            "--seed", "3", "--max-tokens", max_tokens}));
    EXPECT_TRUE(client.ok()) << client.status();
    if (!client.ok()) return nullptr;
    Program& program = **client;
    EXPECT_TRUE(WaitUntil(kLimit, [&] { return !program.out().empty() || program.has_ended(); }));
    EXPECT_FALSE(program.has_ended()) << program.err();
    return *std::move(client);
  }

  double Metric(const std::string& name) {
    const absl::StatusOr<double> value = daemon_->Metric(name);
    EXPECT_TRUE(value.ok()) << value.status();
    return value.ok() ? *value : -1;
  }

  TemporaryDirectory directory_;
  std::unique_ptr<Daemon> daemon_;
};

TEST_F(StreamTest, AClientThatGoesAwayFreesItsCache) {
  // Room for one sequence of full length.
  StartDaemon({"engine.max_sequences=1"});
  ASSERT_NE(daemon_, nullptr);
  for (int round = 0; round < 2; ++round) {
    const std::unique_ptr<Program> client = StartStream("150000");
    ASSERT_NE(client, nullptr);
    EXPECT_TRUE(WaitUntil(kLimit, [&] { return Metric("nestor_num_requests_running") == 1; }));
    EXPECT_GT(Metric("nestor_kv_cache_usage_perc"), 0.5);
    client->Signal(SIGKILL);
    EXPECT_TRUE(WaitUntil(kLimit, [&] { return Metric("nestor_kv_cache_usage_perc") == 0; }));
    EXPECT_EQ(Metric("nestor_num_requests_running"), 0);
  }
  EXPECT_EQ(Metric("nestor_requests_failed_total{reason=\"cancelled\"}"), 2);
}

TEST_F(StreamTest, StoppingFinishesWhatWasAccepted) {
  StartDaemon(
      {"engine.max_sequences=2", "server.drain_grace_ms=0", "server.drain_limit_ms=120000"});
  ASSERT_NE(daemon_, nullptr);
  const std::string tokens = "4000";
  const ProgramResult reference =
      daemon_->Run({"generate", "Once upon a time", "--ignore-eos", "--temperature", "0.9",
                    "--seed", "3", "--max-tokens", tokens});
  ASSERT_EQ(reference.exit_code, 0) << reference.err;
  const std::unique_ptr<Program> client = StartStream(tokens);
  ASSERT_NE(client, nullptr);
  daemon_->program().Signal(SIGTERM);
  ASSERT_FALSE(client->has_ended()) << "too short a text to be interrupted";
  const auto finished = client->Wait(kLimit);
  ASSERT_TRUE(finished.ok()) << finished.status();
  EXPECT_EQ(finished->exit_code, 0) << finished->err;
  EXPECT_EQ(finished->out, reference.out);
  const auto stopped = daemon_->program().Wait(kLimit);
  ASSERT_TRUE(stopped.ok()) << stopped.status();
  EXPECT_EQ(stopped->exit_code, 0) << stopped->err;
}

TEST_F(StreamTest, TheDrainLimitEndsTheRestWithAStatusThatSaysSo) {
  StartDaemon({"engine.max_sequences=2", "server.drain_grace_ms=0", "server.drain_limit_ms=300"});
  ASSERT_NE(daemon_, nullptr);
  const std::unique_ptr<Program> client = StartStream("150000");
  ASSERT_NE(client, nullptr);
  daemon_->program().Signal(SIGTERM);
  const auto stopped = daemon_->program().Wait(kLimit);
  ASSERT_TRUE(stopped.ok()) << stopped.status();
  EXPECT_EQ(stopped->exit_code, 0) << stopped->err;
  const auto ended = client->Wait(kLimit);
  ASSERT_TRUE(ended.ok()) << ended.status();
  EXPECT_EQ(ended->exit_code, 1);
  EXPECT_THAT(ended->err, AllOf(HasSubstr("UNAVAILABLE: "), HasSubstr("shut down")));
}

TEST_F(StreamTest, StoppingWithoutWorkEndsAtOnce) {
  StartDaemon({"engine.max_sequences=2", "server.drain_grace_ms=0"});
  ASSERT_NE(daemon_, nullptr);
  daemon_->program().Signal(SIGTERM);
  const auto stopped = daemon_->program().Wait(kLimit);
  ASSERT_TRUE(stopped.ok()) << stopped.status();
  EXPECT_EQ(stopped->exit_code, 0) << stopped->err;
  EXPECT_EQ(daemon_->Run({"health"}).exit_code, 1);
}

}  // namespace
}  // namespace nestor
