#include "server/server.h"

#include <condition_variable>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "nestor/v1/inference.grpc.pb.h"
#include "tests/testing/fake_engine.h"

namespace nestor {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
namespace health = grpc::health::v1;

// A unary or streaming call's whole outcome.
struct Outcome {
  grpc::Status status;
  std::string text;
  std::vector<int32_t> tokens;
  v1::FinishReason finish_reason = v1::FINISH_REASON_UNSPECIFIED;
  v1::Usage usage;
  std::string retry_after_ms;
};

// One call through the callback API, so that a test can have several in flight.
class PendingCall : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  PendingCall(v1::Inference::Stub* stub, v1::GenerateRequest request)
      : request_(std::move(request)) {
    stub->async()->Generate(&context_, &request_, this);
    StartRead(&response_);
    StartCall();
  }

  Outcome Wait() {
    MutexLock lock(&mutex_);
    while (!is_done_) changed_.Wait(&mutex_);
    return outcome_;
  }
  void WaitForToken() {
    MutexLock lock(&mutex_);
    while (outcome_.tokens.empty() && !is_done_) changed_.Wait(&mutex_);
  }
  void Cancel() { context_.TryCancel(); }
  bool is_done() {
    MutexLock lock(&mutex_);
    return is_done_;
  }
  // Called once the call is over, from gRPC's thread.
  void OnEnd(std::function<void()> callback) {
    MutexLock lock(&mutex_);
    on_end_ = std::move(callback);
    if (is_done_) on_end_();
  }

 private:
  void OnReadDone(bool ok) override {
    if (!ok) return;
    {
      MutexLock lock(&mutex_);
      outcome_.text += response_.text();
      outcome_.tokens.insert(outcome_.tokens.end(), response_.tokens().begin(),
                             response_.tokens().end());
      if (response_.has_usage()) {
        outcome_.finish_reason = response_.finish_reason();
        outcome_.usage = response_.usage();
      }
      changed_.NotifyAll();
    }
    StartRead(&response_);
  }
  void OnDone(const grpc::Status& status) override {
    MutexLock lock(&mutex_);
    outcome_.status = status;
    const auto& metadata = context_.GetServerTrailingMetadata();
    const auto hint = metadata.find("retry-after-ms");
    if (hint != metadata.end()) {
      outcome_.retry_after_ms = std::string(hint->second.data(), hint->second.size());
    }
    is_done_ = true;
    changed_.NotifyAll();
    if (on_end_) on_end_();
  }

  grpc::ClientContext context_;
  v1::GenerateRequest request_;
  v1::GenerateResponse response_;
  Mutex mutex_;
  CondVar changed_;
  Outcome outcome_ ABSL_GUARDED_BY(mutex_);
  bool is_done_ ABSL_GUARDED_BY(mutex_) = false;
  std::function<void()> on_end_ ABSL_GUARDED_BY(mutex_);
};

v1::GenerateRequest TextRequest(const std::string& text, int max_tokens) {
  v1::GenerateRequest request;
  request.set_text(text);
  request.set_max_tokens(max_tokens);
  return request;
}

class ServerTest : public testing::Test {
 protected:
  ServerTest() {
    config_.server_listen = "127.0.0.1:0";
    config_.metrics_listen = "";
    config_.server_drain_grace_ms = 0;
    config_.speculation_enabled = false;  // it depends on measured times, and changes costs
    engine_options_.num_pages = 1000000;
    engine_options_.max_sequence_length = 4000000;
  }

  ~ServerTest() override { control_.AllowAllSteps(); }

  absl::StatusOr<std::unique_ptr<Server>> Listen() {
    auto engine = std::make_unique<FakeEngine>(engine_options_, &control_);
    ServedModel model = engine->Describe();
    return Server::Listen(config_, std::move(engine), std::move(model));
  }

  void StartListening() {
    absl::StatusOr<std::unique_ptr<Server>> server = Listen();
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->port()),
                                   grpc::InsecureChannelCredentials());
    stub_ = v1::Inference::NewStub(channel_);
    health_ = health::Health::NewStub(channel_);
  }

  void Start() {
    StartListening();
    ASSERT_TRUE(server_->WarmUpAndServe().ok());
    num_warm_up_steps_ = static_cast<int64_t>(control_.steps().size());
  }

  Outcome Generate(const v1::GenerateRequest& request) {
    return PendingCall(stub_.get(), request).Wait();
  }

  grpc::Status Score(const v1::ScoreRequest& request, v1::ScoreResponse* response) {
    grpc::ClientContext context;
    return stub_->Score(&context, request, response);
  }

  grpc::Status Embed(const v1::EmbedRequest& request, v1::EmbedResponse* response) {
    grpc::ClientContext context;
    return stub_->Embed(&context, request, response);
  }

  health::HealthCheckResponse::ServingStatus Check(const std::string& service) {
    grpc::ClientContext context;
    health::HealthCheckRequest request;
    request.set_service(service);
    health::HealthCheckResponse response;
    const grpc::Status status = health_->Check(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.status();
  }

  FakeEngineControl control_;
  FakeEngineOptions engine_options_;
  ServerConfig config_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Inference::Stub> stub_;
  std::unique_ptr<health::Health::Stub> health_;
  int64_t num_warm_up_steps_ = 0;
};

TEST_F(ServerTest, GenerateStreamsTextTokensAndUsage) {
  Start();
  const Outcome outcome = Generate(TextRequest("abc", 4));
  EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  EXPECT_EQ(outcome.text, "defg");
  EXPECT_THAT(outcome.tokens, ElementsAre('d', 'e', 'f', 'g'));
  EXPECT_EQ(outcome.finish_reason, v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(outcome.usage.prompt_tokens(), 3);
  EXPECT_EQ(outcome.usage.completion_tokens(), 4);
  ASSERT_EQ(outcome.usage.completion_levels_size(), 1);
  EXPECT_EQ(outcome.usage.completion_levels(0).level(), 2);
  EXPECT_DOUBLE_EQ(outcome.usage.mean_relative_cost(), 1);
  EXPECT_DOUBLE_EQ(outcome.usage.expected_quality(), 1);
  EXPECT_FALSE(outcome.usage.degraded());
  EXPECT_FALSE(outcome.usage.has_target_met());
}

TEST_F(ServerTest, BudgetsChooseTheLevelAndUsageSaysWhatRan) {
  Start();
  v1::GenerateRequest request = TextRequest("abc", 4);
  request.mutable_budget()->set_max_cost(0.7);
  Outcome outcome = Generate(request);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  ASSERT_EQ(outcome.usage.completion_levels_size(), 1);
  EXPECT_EQ(outcome.usage.completion_levels(0).level(), 1);
  EXPECT_NEAR(outcome.usage.mean_relative_cost(), 2.0 / 3, 1e-9);
  EXPECT_NEAR(outcome.usage.expected_quality(), 0.95, 1e-9);

  request.mutable_budget()->Clear();
  request.mutable_budget()->set_level(0);
  outcome = Generate(request);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  ASSERT_EQ(outcome.usage.prompt_levels_size(), 1);
  ASSERT_EQ(outcome.usage.completion_levels_size(), 1);
  EXPECT_EQ(outcome.usage.prompt_levels(0).level(), 0);
  EXPECT_EQ(outcome.usage.completion_levels(0).level(), 0);

  request.mutable_budget()->Clear();
  request.mutable_budget()->mutable_latency_target()->set_nanos(1);
  outcome = Generate(request);
  EXPECT_TRUE(outcome.usage.has_target_met());
  EXPECT_FALSE(outcome.usage.target_met());
}

TEST_F(ServerTest, ARequestMaySpeculateAndGetsTheSameTokens) {
  engine_options_.low_levels_err_at = 5;
  Start();
  v1::GenerateRequest request = TextRequest("abc", 60);
  const Outcome plain = Generate(request);
  request.set_speculate(true);
  const Outcome speculated = Generate(request);
  ASSERT_TRUE(speculated.status.ok()) << speculated.status.error_message();
  EXPECT_EQ(speculated.tokens, plain.tokens);
  EXPECT_EQ(plain.usage.drafted_tokens(), 0);
  EXPECT_LE(speculated.usage.accepted_tokens(), speculated.usage.drafted_tokens());
  EXPECT_DOUBLE_EQ(speculated.usage.expected_quality(), 1);
  ASSERT_EQ(speculated.usage.completion_levels_size(), 1);
  EXPECT_EQ(speculated.usage.completion_levels(0).level(), 2);
}

TEST_F(ServerTest, TokenIdsArePrompts) {
  Start();
  v1::GenerateRequest request;
  request.mutable_tokens()->add_ids('p');
  request.set_max_tokens(2);
  EXPECT_EQ(Generate(request).text, "qr");
}

TEST_F(ServerTest, ScoreReturnsOneFewerThanTokens) {
  Start();
  v1::ScoreRequest request;
  request.set_text("ab!");
  v1::ScoreResponse response;
  const grpc::Status status = Score(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_THAT(response.tokens(), ElementsAre('a', 'b', '!'));
  EXPECT_THAT(response.log_probabilities(), ElementsAre(-(97000.0 + 98), -(98000.0 + 33)));
  EXPECT_EQ(response.usage().prompt_tokens(), 3);
  EXPECT_FALSE(response.request_id().empty());
}

TEST_F(ServerTest, EmbedJoinsItsTextsInOrder) {
  engine_options_.is_encoder = true;
  engine_options_.max_sequence_length = 64;
  Start();
  v1::EmbedRequest request;
  request.add_texts("abc");
  request.add_texts("zy");
  request.mutable_budget()->set_level(1);
  v1::EmbedResponse response;
  const grpc::Status status = Embed(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.embeddings_size(), 2);
  EXPECT_THAT(response.embeddings(0).values(), ElementsAre(1, 3, 'a', 'c'));
  EXPECT_THAT(response.embeddings(1).values(), ElementsAre(1, 2, 'z', 'y'));
  EXPECT_EQ(response.usage().prompt_tokens(), 5);
}

TEST_F(ServerTest, FailedTextFailsItsCallAndNoOther) {
  engine_options_.is_encoder = true;
  engine_options_.max_sequence_length = 64;
  Start();
  control_.FailToken('x');
  v1::EmbedRequest request;
  request.add_texts("abc");
  request.add_texts("x");
  v1::EmbedResponse response;
  EXPECT_EQ(Embed(request, &response).error_code(), grpc::StatusCode::INTERNAL);
  request.mutable_texts()->RemoveLast();
  EXPECT_TRUE(Embed(request, &response).ok());
}

TEST_F(ServerTest, GetModelTellsLevelsWithMeasuredSpeed) {
  Start();
  grpc::ClientContext context;
  v1::GetModelResponse response;
  ASSERT_TRUE(stub_->GetModel(&context, v1::GetModelRequest(), &response).ok());
  EXPECT_EQ(response.name(), "fake");
  ASSERT_EQ(response.levels_size(), 3);
  EXPECT_EQ(response.levels(2).form(), "full");
  for (const v1::Level& level : response.levels()) EXPECT_GT(level.tokens_per_second(), 0);
}

struct BadRequest {
  const char* name;
  v1::GenerateRequest request;
  grpc::StatusCode code;
  const char* message;
};

TEST_F(ServerTest, BadRequestsGetAClearStatus) {
  engine_options_.max_sequence_length = 64;
  Start();
  const auto with = [](auto change) {
    v1::GenerateRequest request = TextRequest("abc", 4);
    change(&request);
    return request;
  };
  constexpr auto kInvalid = grpc::StatusCode::INVALID_ARGUMENT;
  constexpr auto kPrecondition = grpc::StatusCode::FAILED_PRECONDITION;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<BadRequest> requests = {
      {"no prompt", {}, kInvalid, "prompt: must not be empty"},
      {"empty text", TextRequest("", 4), kInvalid, "prompt: must not be empty"},
      {"empty ids", with([](auto* r) { r->mutable_tokens(); }), kInvalid, "must not be empty"},
      {"id out of range", with([](auto* r) { r->mutable_tokens()->add_ids(256); }), kInvalid,
       "tokens.ids[0]: must be in [0, 255]; was 256"},
      {"negative id", with([](auto* r) { r->mutable_tokens()->add_ids(-1); }), kInvalid, "was -1"},
      {"too long", TextRequest(std::string(64, 'a'), 4), kInvalid,
       "64 tokens do not fit the context of 64"},
      {"no tokens wanted", TextRequest("a", 0), kInvalid, "max_tokens: must be at least 1; was 0"},
      {"empty stop", with([](auto* r) { r->add_stop(""); }), kInvalid, "stop[0]"},
      {"temperature", with([](auto* r) { r->mutable_sampling()->set_temperature(-1); }), kInvalid,
       "temperature"},
      {"top_p", with([](auto* r) { r->mutable_sampling()->set_top_p(0); }), kInvalid, "top_p"},
      {"chat without template", with([](auto* r) { r->mutable_chat()->add_messages(); }),
       kPrecondition, "chat template"},
      {"not UTF-8", TextRequest("\xff\xfe", 4), kInvalid, "UTF-8"},
      {"level", with([](auto* r) { r->mutable_budget()->set_level(3); }), kInvalid,
       "budget.level: must be in [0, 2]; was 3"},
      {"NaN", with([&](auto* r) { r->mutable_budget()->set_max_cost(nan); }), kInvalid,
       "budget.max_cost"},
      {"negative duration",
       with([](auto* r) { r->mutable_budget()->mutable_latency_target()->set_seconds(-1); }),
       kInvalid, "budget.latency_target"},
      {"duration beyond range", with([](auto* r) {
         r->mutable_budget()->mutable_per_token_target()->set_seconds(300'000'000'000);
       }),
       kInvalid, "budget.per_token_target: out of range"},
      {"contradiction", with([](auto* r) {
         r->mutable_budget()->set_level(2);
         r->mutable_budget()->set_max_cost(0.5);
       }),
       kInvalid, "contradictory"},
      {"no level", with([](auto* r) { r->mutable_budget()->set_max_cost(0.2); }), kPrecondition,
       "the cheapest is level 0"},
  };
  for (const BadRequest& bad : requests) {
    const Outcome outcome = Generate(bad.request);
    EXPECT_EQ(outcome.status.error_code(), bad.code) << bad.name;
    EXPECT_THAT(outcome.status.error_message(), HasSubstr(bad.message)) << bad.name;
  }
  EXPECT_TRUE(Generate(TextRequest("abc", 4)).status.ok());
}

TEST_F(ServerTest, TruncationKeepsTheNewestTokensWhereAskedFor) {
  engine_options_.max_sequence_length = 10;
  Start();
  v1::GenerateRequest request = TextRequest("abcdefghijklmnop", 3);
  request.set_truncate(true);
  const Outcome outcome = Generate(request);
  EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  EXPECT_EQ(outcome.usage.prompt_tokens(), 7);
  EXPECT_EQ(outcome.text, "qrs");
}

TEST_F(ServerTest, CallsTheModelCannotServeAreFailedPreconditions) {
  Start();
  v1::EmbedRequest request;
  request.add_texts("a");
  v1::EmbedResponse response;
  const grpc::Status status = Embed(request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("language model"));
}

TEST_F(ServerTest, EncoderRefusesGenerateAndScore) {
  engine_options_.is_encoder = true;
  engine_options_.max_sequence_length = 64;
  Start();
  const Outcome outcome = Generate(TextRequest("abc", 4));
  EXPECT_EQ(outcome.status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(outcome.status.error_message(), HasSubstr("encoder"));
  v1::ScoreRequest request;
  request.set_text("abc");
  v1::ScoreResponse response;
  EXPECT_EQ(Score(request, &response).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(ServerTest, BadEmbedRequestsNameTheText) {
  engine_options_.is_encoder = true;
  engine_options_.max_sequence_length = 8;
  Start();
  v1::EmbedRequest request;
  v1::EmbedResponse response;
  EXPECT_EQ(Embed(request, &response).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.add_texts("abc");
  request.add_texts("");
  EXPECT_THAT(Embed(request, &response).error_message(), HasSubstr("texts[1]: must not be empty"));
  request.set_texts(1, "more than eight");
  EXPECT_THAT(Embed(request, &response).error_message(), HasSubstr("texts[1]: 15 tokens"));
  request.set_truncate(true);
  EXPECT_TRUE(Embed(request, &response).ok());
  EXPECT_THAT(response.embeddings(1).values(), ElementsAre(2, 8, 'm', 't'));
  for (int i = 0; i < 200; ++i) request.add_texts("a");
  EXPECT_THAT(Embed(request, &response).error_message(), HasSubstr("at most 128"));
}

TEST_F(ServerTest, ScoreNeedsTwoTokens) {
  Start();
  v1::ScoreRequest request;
  request.set_text("a");
  v1::ScoreResponse response;
  const grpc::Status status = Score(request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("at least 2 tokens; got 1"));
}

TEST_F(ServerTest, OversizedMessageIsResourceExhausted) {
  config_.server_max_message_bytes = 1024;
  Start();
  EXPECT_EQ(Generate(TextRequest(std::string(5000, 'a'), 4)).status.error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST_F(ServerTest, FullQueueComesWithARetryHint) {
  engine_options_.engine.max_sequences = 1;
  config_.engine_max_sequences = 1;
  config_.scheduler_max_queue = 1;
  config_.limits_max_texts = 1;
  Start();
  control_.AllowSteps(num_warm_up_steps_);
  PendingCall running(stub_.get(), TextRequest("abc", 2));
  control_.WaitForSteps(num_warm_up_steps_ + 1);
  // One of these takes the only place in the queue; the other cannot end before it is refused.
  Mutex mutex;
  CondVar changed;
  int num_ended = 0;
  const auto count = [&] {
    MutexLock lock(&mutex);
    ++num_ended;
    changed.NotifyAll();
  };
  PendingCall second(stub_.get(), TextRequest("abc", 2));
  PendingCall third(stub_.get(), TextRequest("abc", 2));
  second.OnEnd(count);
  third.OnEnd(count);
  {
    MutexLock lock(&mutex);
    while (num_ended == 0) changed.Wait(&mutex);
  }
  PendingCall& refused = second.is_done() ? second : third;
  PendingCall& waiting = second.is_done() ? third : second;
  EXPECT_EQ(refused.Wait().status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_FALSE(refused.Wait().retry_after_ms.empty());
  control_.AllowAllSteps();
  EXPECT_TRUE(running.Wait().status.ok());
  EXPECT_TRUE(waiting.Wait().status.ok());
}

TEST_F(ServerTest, ClientThatLeavesFreesItsRoom) {
  engine_options_.num_pages = 1000;
  engine_options_.max_sequence_length = 4000;
  config_.limits_default_max_tokens = 3999;  // all pages
  Start();
  v1::GenerateRequest request;
  request.set_text("a");
  request.set_ignore_eos(true);
  control_.AllowSteps(num_warm_up_steps_ + 2);
  PendingCall leaving(stub_.get(), request);
  leaving.WaitForToken();
  leaving.Cancel();
  EXPECT_EQ(leaving.Wait().status.error_code(), grpc::StatusCode::CANCELLED);
  control_.AllowAllSteps();
  // Needs every page, so it runs only once those of the first are free.
  request.set_max_tokens(3999);
  EXPECT_TRUE(Generate(request).status.ok());
}

TEST_F(ServerTest, HealthFollowsTheServersLife) {
  StartListening();
  EXPECT_EQ(Check(""), health::HealthCheckResponse::SERVING);
  EXPECT_EQ(Check("nestor.v1.Inference"), health::HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Generate(TextRequest("abc", 1)).status.error_code(), grpc::StatusCode::UNAVAILABLE);

  grpc::ClientContext context;
  health::HealthCheckRequest request;
  request.set_service("nestor.v1.Inference");
  const auto watch = health_->Watch(&context, request);
  health::HealthCheckResponse response;
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), health::HealthCheckResponse::NOT_SERVING);
  ASSERT_TRUE(server_->WarmUpAndServe().ok());
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), health::HealthCheckResponse::SERVING);
  EXPECT_EQ(Check("nestor.v1.Inference"), health::HealthCheckResponse::SERVING);
  std::thread drain([&] { server_->Drain(); });
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), health::HealthCheckResponse::NOT_SERVING);
  context.TryCancel();
  drain.join();
}

TEST_F(ServerTest, DrainFinishesWhatWasAccepted) {
  Start();
  control_.AllowSteps(num_warm_up_steps_ + 1);
  PendingCall call(stub_.get(), TextRequest("abc", 4));
  call.WaitForToken();
  std::thread drain([&] { server_->Drain(); });
  control_.AllowAllSteps();
  const Outcome outcome = call.Wait();
  drain.join();
  EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  EXPECT_EQ(outcome.text, "defg");
}

TEST_F(ServerTest, DrainLimitEndsAStreamWithAStatusAndUsage) {
  config_.server_drain_limit_ms = 1;
  Start();
  v1::GenerateRequest request = TextRequest("abc", 3000000);
  request.set_ignore_eos(true);
  PendingCall call(stub_.get(), request);
  call.WaitForToken();
  server_->Drain();
  const Outcome outcome = call.Wait();
  EXPECT_EQ(outcome.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(outcome.status.error_message(), HasSubstr("shut down"));
  EXPECT_EQ(outcome.finish_reason, v1::FINISH_REASON_DRAIN);
  EXPECT_EQ(outcome.usage.completion_tokens(), static_cast<int>(outcome.tokens.size()));
}

TEST_F(ServerTest, BusyPortIsAnErrorThatNamesIt) {
  StartListening();
  config_.server_listen = "127.0.0.1:" + std::to_string(server_->port());
  const absl::StatusOr<std::unique_ptr<Server>> second = Listen();
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()),
              AllOf(HasSubstr("server.listen"), HasSubstr(config_.server_listen)));
}

TEST_F(ServerTest, ReflectionListsTheService) {
  Start();
  grpc::GenericStub stub(channel_);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareCall(
      &context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue);
  void* tag = nullptr;
  bool ok = false;
  const auto next = [&] { return queue.Next(&tag, &ok) && ok; };
  call->StartCall(nullptr);
  ASSERT_TRUE(next());
  // ServerReflectionRequest{list_services: ""}: field 7, length 0.
  const grpc::Slice slice(std::string("\x3a\x00", 2));
  const grpc::ByteBuffer request(&slice, 1);
  call->Write(request, nullptr);
  ASSERT_TRUE(next());
  grpc::ByteBuffer response;
  call->Read(&response, nullptr);
  ASSERT_TRUE(next());
  std::vector<grpc::Slice> slices;
  ASSERT_TRUE(response.Dump(&slices).ok());
  std::string text;
  for (const grpc::Slice& part : slices) {
    text.append(reinterpret_cast<const char*>(part.begin()), part.size());
  }
  EXPECT_THAT(text, HasSubstr("nestor.v1.Inference"));
  grpc::Status status;
  call->WritesDone(nullptr);
  ASSERT_TRUE(next());
  call->Finish(&status, nullptr);
  ASSERT_TRUE(next());
  EXPECT_TRUE(status.ok());
}

TEST_F(ServerTest, MetricsPageShowsTheCounters) {
  config_.metrics_listen = "127.0.0.1:0";
  Start();
  EXPECT_GT(server_->metrics_port(), 0);
  EXPECT_TRUE(Generate(TextRequest("abc", 4)).status.ok());
  EXPECT_THAT(server_->metrics().Text(), HasSubstr("nestor_generation_tokens_total 4"));
}

}  // namespace
}  // namespace nestor
