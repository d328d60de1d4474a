#include "server/config/server_config.h"

#include "base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string ErrorOf(const std::string& text) {
  return std::string(ParseConfig(text, "test.yaml").status().message());
}

TEST(ServerConfigTest, ShippedFileNamesEveryKeyWithItsDefault) {
  const auto text = ReadFile(NESTOR_SOURCE_DIR "/config/nestord.yaml");
  ASSERT_TRUE(text.ok()) << text.status();
  const auto config = ParseConfig(*text, "config/nestord.yaml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(ToJson(*config).dump(), ToJson(ServerConfig()).dump());
  for (const std::string& key : ConfigKeys()) {
    const std::string name = "\n  " + key.substr(key.find('.') + 1) + ": ";
    EXPECT_THAT(*text, HasSubstr(name)) << key;
  }
}

TEST(ServerConfigTest, EmptyFileGivesTheDefaults) {
  const auto config = ParseConfig("", "test.yaml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(ToJson(*config).dump(), ToJson(ServerConfig()).dump());
}

TEST(ServerConfigTest, ValuesAreTaken) {
  const auto config = ParseConfig(
      "server: {listen: '127.0.0.1:0'}\nscheduler: {max_queue: 300}\nmetrics: {listen: ''}\n",
      "test.yaml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->server_listen, "127.0.0.1:0");
  EXPECT_EQ(config->scheduler_max_queue, 300);
  EXPECT_EQ(config->metrics_listen, "");
}

TEST(ServerConfigTest, EveryViolationIsReportedAtOnce) {
  const std::string error = ErrorOf(
      "server: {drain_limit_ms: -3, listen: nowhere}\n"
      "scheduler: {max_queue: many, max_cue: 5}\n"
      "stream: {buffer_tokens: 0}\n");
  EXPECT_THAT(error, AllOf(HasSubstr("test.yaml: 5 errors"),
                           HasSubstr("server.drain_limit_ms: must be in [0, 86400000]; was -3"),
                           HasSubstr("server.listen: must be ADDRESS:PORT; was 'nowhere'"),
                           HasSubstr("scheduler.max_queue: must be an integer; was 'many'"),
                           HasSubstr("scheduler.max_cue: unknown key; its value was '5'"),
                           HasSubstr("stream.buffer_tokens: must be in [1,")));
}

TEST(ServerConfigTest, SwitchesAreTrueOrFalse) {
  const auto config = ParseConfig("speculation: {enabled: false, max_draft: 0}", "test.yaml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_FALSE(config->speculation_enabled);
  EXPECT_EQ(config->speculation_max_draft, 0);
  EXPECT_THAT(ErrorOf("speculation: {enabled: maybe, max_draft: 9}"),
              AllOf(HasSubstr("speculation.enabled: must be true or false; was 'maybe'"),
                    HasSubstr("speculation.max_draft: must be in [0, 8]; was 9")));
}

TEST(ServerConfigTest, ThreadsArePinnedByChoice) {
  EXPECT_FALSE(ServerConfig().device_pin_threads);
  const auto config = ParseConfig("device: {threads: 2, pin_threads: true}", "test.yaml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->device_pin_threads);
  EXPECT_THAT(ErrorOf("device: {pin_threads: 1}"),
              HasSubstr("device.pin_threads: must be true or false; was '1'"));
}

TEST(ServerConfigTest, TheTypeOfTheCacheIsOneOfTwo) {
  const auto config = ParseConfig("engine: {kv_cache_type: fp32}", "test.yaml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->engine_kv_cache_type, "fp32");
  EXPECT_THAT(ErrorOf("engine: {kv_cache_type: fp16}"),
              HasSubstr("engine.kv_cache_type: must be bf16 or fp32; was 'fp16'"));
}

TEST(ServerConfigTest, ExtraCostsAreAListThatACommandLineSeparatesByCommas) {
  EXPECT_TRUE(ServerConfig().engine_extra_costs.empty());
  auto config = ParseConfig("engine: {extra_costs: [0.65, 'prefix:0.72']}", "test.yaml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->engine_extra_costs, ElementsAre("0.65", "prefix:0.72"));
  ASSERT_TRUE(OverrideConfig({{"engine.extra_costs", "residual:0.6,0.7"}}, &*config).ok());
  EXPECT_THAT(config->engine_extra_costs, ElementsAre("residual:0.6", "0.7"));
  EXPECT_EQ(ToJson(*config)["engine.extra_costs"].dump(), R"(["residual:0.6","0.7"])");
  EXPECT_THAT(ErrorOf("engine: {extra_costs: {a: 1}}"), HasSubstr("must be a single value"));
}

TEST(ServerConfigTest, KeysThatContradictEachOtherAreReported) {
  EXPECT_THAT(ErrorOf("engine: {max_sequences: 600}"), HasSubstr("engine.max_sequences"));
  EXPECT_THAT(ErrorOf("limits: {max_texts: 500}"), HasSubstr("limits.max_texts"));
}

TEST(ServerConfigTest, WrongShapesAreReported) {
  EXPECT_THAT(ErrorOf("- a\n- b\n"), HasSubstr("must be a map"));
  EXPECT_THAT(ErrorOf("server: 5\n"), HasSubstr("server: must be a group of keys"));
  EXPECT_THAT(ErrorOf("server: {listen: [1, 2]}\n"), HasSubstr("server.listen: must be a single"));
  EXPECT_THAT(ErrorOf("server: {listen: 'a:1', listen: 'b:2'}\n"), HasSubstr("twice"));
}

TEST(ServerConfigTest, BrokenYamlNamesTheFileAndTheLine) {
  EXPECT_THAT(ErrorOf("server:\n  listen: [\n"), AllOf(HasSubstr("test.yaml"), HasSubstr("line")));
}

TEST(ServerConfigTest, PortsOutOfRangeAreRefused) {
  EXPECT_THAT(ErrorOf("server: {listen: '127.0.0.1:70000'}"), HasSubstr("70000"));
  EXPECT_THAT(ErrorOf("server: {listen: ':50051'}"), HasSubstr("ADDRESS:PORT"));
}

TEST(ServerConfigTest, OverridesNameTheCommandLine) {
  ServerConfig config;
  EXPECT_TRUE(OverrideConfig({{"server.listen", "127.0.0.1:0"}}, &config).ok());
  EXPECT_EQ(config.server_listen, "127.0.0.1:0");
  const absl::Status status =
      OverrideConfig({{"server.port", "1"}, {"scheduler.max_queue", "0"}}, &config);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("command line"), HasSubstr("server.port: unknown key"),
                    HasSubstr("scheduler.max_queue")));
}

}  // namespace
}  // namespace nestor
