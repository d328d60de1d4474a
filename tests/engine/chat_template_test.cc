#include "engine/chat_template.h"

#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

using testing::HasSubstr;

absl::StatusOr<std::string> RenderOnce(const std::string& source,
                                       const std::vector<ChatTurn>& turns,
                                       bool adds_generation_prompt = false) {
  auto parsed = ChatTemplate::Parse(source, "<bos>", "<eos>");
  if (!parsed.ok()) return parsed.status();
  return (*parsed)->Render(turns, adds_generation_prompt);
}

std::string ErrorOf(const std::string& source) {
  const auto rendered = RenderOnce(source, {{"user", "Hi"}});
  EXPECT_FALSE(rendered.ok()) << *rendered;
  EXPECT_EQ(rendered.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(rendered.status().message());
}

// Against PyPI's jinja2: see scripts/make_tokenizer_fixtures.py.
TEST(ChatTemplateTest, RendersAsJinjaDoes) {
  const auto content = ReadFile(NESTOR_SOURCE_DIR "/tests/data/tokenizers/chat_templates.json");
  ASSERT_TRUE(content.ok()) << content.status();
  for (const nlohmann::json& fixture : nlohmann::json::parse(*content)) {
    const std::string source = fixture["template"];
    for (const nlohmann::json& expected : fixture["cases"]) {
      SCOPED_TRACE(absl::StrCat(fixture["name"].get<std::string>(), ": ", source));
      std::vector<ChatTurn> turns;
      for (const auto& message : expected["messages"]) {
        turns.push_back({.role = message[0], .content = message[1]});
      }
      const auto rendered = RenderOnce(source, turns, expected["add_generation_prompt"]);
      if (expected.contains("error")) {
        EXPECT_EQ(rendered.status().code(), absl::StatusCode::kInvalidArgument);
        // What the template raises arrives word by word; other messages are our own.
        if (absl::StrContains(source, "raise_exception(")) {
          EXPECT_THAT(std::string(rendered.status().message()),
                      HasSubstr(expected["error"].get<std::string>()));
        }
      } else {
        ASSERT_TRUE(rendered.ok()) << rendered.status();
        EXPECT_EQ(*rendered, expected["text"].get<std::string>());
      }
    }
  }
}

TEST(ChatTemplateTest, UnsupportedConstructIsNamedWithItsLine) {
  EXPECT_THAT(ErrorOf("a\n{% include 'x' %}"), HasSubstr("line 2: {% include %}"));
  EXPECT_THAT(ErrorOf("\n\n{{ 1.5 }}"), HasSubstr("line 3: floating-point"));
  EXPECT_THAT(ErrorOf("{{ 2 ** 3 }}"), HasSubstr("operator '**'"));
  EXPECT_THAT(ErrorOf("\n{{ messages | shuffle }}"), HasSubstr("line 2: filter 'shuffle'"));
  EXPECT_THAT(ErrorOf("{{ 'a'.encode() }}"), HasSubstr("method 'encode'"));
  EXPECT_THAT(ErrorOf("{{ 1 is prime }}"), HasSubstr("test 'prime'"));
  EXPECT_THAT(ErrorOf("{{ now() }}"), HasSubstr("function 'now'"));
  EXPECT_THAT(ErrorOf("{{ messages }}"), HasSubstr("printing a list"));
  EXPECT_THAT(ErrorOf("{% for m in messages recursive %}{% endfor %}"), HasSubstr("recursive"));
}

// Templates hold branches for tools that a plain conversation never enters.
TEST(ChatTemplateTest, UnsupportedFilterMattersOnlyWhereItRuns) {
  const auto rendered = RenderOnce("{% if tools %}{{ tools | pprint }}{% endif %}x", {});
  ASSERT_TRUE(rendered.ok()) << rendered.status();
  EXPECT_EQ(*rendered, "x");
}

TEST(ChatTemplateTest, WorkIsBounded) {
  const auto code_of = [](const std::string& source) {
    return RenderOnce(source, {}).status().code();
  };
  EXPECT_EQ(code_of("{% for i in range(9999) %}{% for j in range(9999) %}{{ 1 }}{% endfor %}"
                    "{% endfor %}"),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(code_of("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(code_of("{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
                    "{% set ns.x = ns.x + ns.x %}{% endfor %}"),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(code_of("{{ 'ab' * 99999999999 }}"), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(code_of("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"),
            absl::StatusCode::kResourceExhausted);
}

TEST(ChatTemplateTest, NestingIsBounded) {
  const size_t depth = 100000;
  EXPECT_THAT(ErrorOf("{{ " + std::string(depth, '(') + "1" + std::string(depth, ')') + " }}"),
              HasSubstr("nested too deeply"));
  std::string sum = "{{ 1";
  for (size_t i = 0; i < depth; ++i) sum += " + 1";
  EXPECT_THAT(ErrorOf(sum + " }}"), HasSubstr("nested too deeply"));
  std::string ifs;
  for (size_t i = 0; i < depth; ++i) ifs += "{% if true %}";
  EXPECT_THAT(ErrorOf(ifs), HasSubstr("nested too deeply"));
  std::string nots = "{{ ";
  for (size_t i = 0; i < depth; ++i) nots += "not ";
  EXPECT_THAT(ErrorOf(nots + "1 }}"), HasSubstr("nested too deeply"));
}

TEST(ChatTemplateTest, MessagesMustBeUtf8) {
  EXPECT_EQ(RenderOnce("{{ messages[0].content }}", {{"user", "\xff"}}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

class ChatTemplateLoadTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = absl::StrCat(testing::TempDir(), "/chat_template_", getpid());
    std::filesystem::create_directory(directory_);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  void Write(const std::string& name, const std::string& content) {
    ASSERT_TRUE(WriteFileAtomically(absl::StrCat(directory_, "/", name), content).ok());
  }
  std::string Rendered() const {
    auto loaded = ChatTemplate::Load(directory_);
    if (!loaded.ok()) return std::string(loaded.status().message());
    return *(*loaded)->Render({{"user", "Hi"}}, true);
  }

  std::string directory_;
};

TEST_F(ChatTemplateLoadTest, ReadsTheTemplateAndTheTokens) {
  Write("tokenizer_config.json",
        R"({"bos_token": "<s>", "eos_token": {"content": "</s>", "special": true},
            "chat_template": "{{ bos_token ~ messages[0].content ~ eos_token }}"})");
  EXPECT_EQ(Rendered(), "<s>Hi</s>");
}

TEST_F(ChatTemplateLoadTest, TakesTheDefaultOfSeveralTemplates) {
  Write("tokenizer_config.json",
        R"({"bos_token": null, "chat_template": [{"name": "tool_use", "template": "t"},
                                                 {"name": "default", "template": "d"}]})");
  EXPECT_EQ(Rendered(), "d");
}

TEST_F(ChatTemplateLoadTest, FileOfItsOwnGoesFirst) {
  Write("tokenizer_config.json", R"({"chat_template": "config"})");
  Write("chat_template.jinja", "file");
  EXPECT_EQ(Rendered(), "file");
}

TEST_F(ChatTemplateLoadTest, MissingTemplateIsNotFound) {
  EXPECT_EQ(ChatTemplate::Load(directory_).status().code(), absl::StatusCode::kNotFound);
  Write("tokenizer_config.json", R"({"bos_token": "<s>"})");
  EXPECT_EQ(ChatTemplate::Load(directory_).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Rendered(), HasSubstr("tokenizer_config.json: has no chat_template"));
}

TEST_F(ChatTemplateLoadTest, ErrorsNameTheFile) {
  Write("tokenizer_config.json", R"({"chat_template": "{% call x() %}"})");
  EXPECT_THAT(Rendered(), HasSubstr("tokenizer_config.json: chat template line 1: {% call %}"));
  Write("tokenizer_config.json", R"({"chat_template": 5})");
  EXPECT_THAT(Rendered(), HasSubstr("tokenizer_config.json: chat_template: must be a string"));
  Write("tokenizer_config.json", R"({"chat_)");
  EXPECT_THAT(Rendered(), HasSubstr("tokenizer_config.json: "));
}

}  // namespace
}  // namespace nestor
