#include "engine/model_spec.h"

#include <functional>

#include "base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;

class ModelSpecTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTinyLlama(llama()).ok());
    ASSERT_TRUE(WriteTinyBert(bert()).ok());
  }
  std::string llama() const { return directory_.path() + "/llama"; }
  std::string bert() const { return directory_.path() + "/bert"; }

  // The spec of the tiny Llama with a changed config.json.
  absl::StatusOr<ModelSpec> ReadChanged(const std::function<void(Json*)>& change) {
    Json config = Json::parse(*ReadFile(llama() + "/config.json"));
    change(&config);
    EXPECT_TRUE(WriteFileAtomically(llama() + "/config.json", config.dump()).ok());
    return ReadModelSpec(llama());
  }
  std::string ErrorOfChanged(const std::function<void(Json*)>& change) {
    return std::string(ReadChanged(change).status().message());
  }

  TemporaryDirectory directory_;
};

TEST_F(ModelSpecTest, LlamaIsDescribed) {
  const auto spec = ReadModelSpec(llama());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->architecture, "LlamaForCausalLM");
  EXPECT_EQ(spec->head_dim, 12);
  EXPECT_EQ(spec->num_kv_heads, 2);
  EXPECT_EQ(spec->rope_theta, 10000);
  EXPECT_TRUE(spec->causal);
  EXPECT_THAT(spec->end_tokens, ElementsAre(257));
  EXPECT_EQ(LayersOf(*spec).size(), 2u * 7 + 1);
  EXPECT_EQ(LayersOf(*spec).back().name, "model.embed_tokens");
}

TEST_F(ModelSpecTest, BertIsDescribed) {
  const auto spec = ReadModelSpec(bert());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_TRUE(spec->is_encoder());
  EXPECT_TRUE(spec->norms_after);
  EXPECT_EQ(spec->activation, ActivationKind::kGeluErf);
  EXPECT_EQ(LayersOf(*spec).size(), 2u * 6);
  EXPECT_TRUE(LayersOf(*spec)[0].has_bias);
}

TEST_F(ModelSpecTest, ClsPoolingIsRead) {
  ASSERT_TRUE(
      WriteFileAtomically(bert() + "/1_Pooling/config.json",
                          R"({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false})")
          .ok());
  EXPECT_EQ(ReadModelSpec(bert())->pooling, PoolingKind::kCls);
}

TEST_F(ModelSpecTest, TransformersFiveWritesRopeParameters) {
  const auto spec = ReadChanged([](Json* config) {
    config->erase("rope_theta");
    (*config)["rope_parameters"] = {{"rope_theta", 500000.0}, {"rope_type", "default"}};
  });
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->rope_theta, 500000);
}

TEST_F(ModelSpecTest, GenerationConfigNamesTheEndTokens) {
  ASSERT_TRUE(
      WriteFileAtomically(llama() + "/generation_config.json", R"({"eos_token_id": [256, 257]})")
          .ok());
  EXPECT_THAT(ReadModelSpec(llama())->end_tokens, ElementsAre(256, 257));
}

TEST_F(ModelSpecTest, AnUnknownArchitectureIsNamed) {
  EXPECT_THAT(ErrorOfChanged([](Json* c) { (*c)["architectures"] = {"MambaForCausalLM"}; }),
              AllOf(HasSubstr("config.json"), HasSubstr("MambaForCausalLM"),
                    HasSubstr("LlamaForCausalLM")));
}

TEST_F(ModelSpecTest, AMissingKeyIsNamed) {
  EXPECT_THAT(ErrorOfChanged([](Json* c) { c->erase("hidden_size"); }),
              AllOf(HasSubstr("config.json: hidden_size"), HasSubstr("absent")));
}

TEST_F(ModelSpecTest, AValueOutOfRangeIsNamed) {
  EXPECT_THAT(ErrorOfChanged([](Json* c) { (*c)["num_hidden_layers"] = -2; }),
              AllOf(HasSubstr("num_hidden_layers"), HasSubstr("-2")));
}

TEST_F(ModelSpecTest, HeadsThatDoNotDivideAreRefused) {
  EXPECT_THAT(ErrorOfChanged([](Json* c) { (*c)["num_key_value_heads"] = 4; }),
              HasSubstr("num_key_value_heads"));
}

TEST_F(ModelSpecTest, Llama3ScalingIsReadFromBothSpellings) {
  const Json rope = {{"rope_type", "llama3"},   {"rope_theta", 500000.0},
                     {"factor", 32.0},          {"low_freq_factor", 1.0},
                     {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 8192}};
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const auto spec = ReadChanged([&](Json* c) {
      c->erase("rope_parameters");
      (*c)[key] = rope;
    });
    ASSERT_TRUE(spec.ok()) << spec.status();
    EXPECT_EQ(spec->rope_theta, 500000);
    EXPECT_EQ(spec->rope_scaling.factor, 32);
    EXPECT_EQ(spec->rope_scaling.low_frequency_factor, 1);
    EXPECT_EQ(spec->rope_scaling.high_frequency_factor, 4);
    EXPECT_EQ(spec->rope_scaling.original_context, 8192);
  }
}

TEST_F(ModelSpecTest, AnotherRopeTypeIsNotSupported) {
  const auto spec = ReadChanged([](Json* c) {
    (*c)["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}};
  });
  EXPECT_TRUE(absl::IsUnimplemented(spec.status())) << spec.status();
  EXPECT_THAT(std::string(spec.status().message()),
              AllOf(HasSubstr("config.json: rope_scaling.rope_type: \"yarn\""),
                    HasSubstr("default, linear, llama3")));
}

TEST_F(ModelSpecTest, ABadRopeKeyIsNamedWithItsObject) {
  EXPECT_THAT(ErrorOfChanged([](Json* c) {
                (*c)["rope_scaling"] = {{"type", "linear"}, {"factor", 0}};
              }),
              AllOf(HasSubstr("config.json: rope_scaling.factor: expected a positive number"),
                    HasSubstr("was 0")));
  EXPECT_THAT(ErrorOfChanged([](Json* c) {
                (*c)["rope_scaling"] = {{"rope_type", "llama3"},
                                        {"factor", 8},
                                        {"low_freq_factor", 4},
                                        {"high_freq_factor", 4}};
              }),
              AllOf(HasSubstr("rope_scaling.high_freq_factor"), HasSubstr("more than"),
                    HasSubstr("was 4")));
}

TEST_F(ModelSpecTest, Qwen2HasBiasesOnQueryKeyAndValueOnly) {
  const auto spec = ReadChanged([](Json* c) { (*c)["architectures"] = {"Qwen2ForCausalLM"}; });
  ASSERT_TRUE(spec.ok()) << spec.status();
  std::vector<bool> has_bias;
  for (const LinearSpec& layer : LayersOf(*spec)) {
    if (layer.block == 0) has_bias.push_back(layer.has_bias);
  }
  EXPECT_THAT(has_bias, ElementsAre(true, true, true, false, false, false, false));
}

TEST_F(ModelSpecTest, ASlidingWindowIsNotSupported) {
  for (const char* architecture : {"Qwen2ForCausalLM", "Qwen3ForCausalLM"}) {
    const auto spec = ReadChanged([&](Json* c) {
      (*c)["architectures"] = {architecture};
      (*c)["use_sliding_window"] = true;
    });
    EXPECT_TRUE(absl::IsUnimplemented(spec.status())) << spec.status();
    EXPECT_THAT(std::string(spec.status().message()),
                AllOf(HasSubstr("config.json: use_sliding_window: true"), HasSubstr("false")));
  }
}

TEST_F(ModelSpecTest, Qwen3HasNormsOfHeadsAndSaysTheirSize) {
  const auto change = [](Json* c) {
    (*c)["architectures"] = {"Qwen3ForCausalLM"};
    (*c)["head_dim"] = 32;
  };
  const auto spec = ReadChanged(change);
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->head_dim, 32);
  EXPECT_EQ(spec->names.query_norm, "model.layers.{}.self_attn.q_norm");
  EXPECT_FALSE(LayersOf(*spec)[0].has_bias);
  EXPECT_EQ(LayersOf(*spec)[0].out, 6 * 32);
  EXPECT_THAT(ErrorOfChanged([&](Json* c) { c->erase("head_dim"); }),
              AllOf(HasSubstr("config.json: head_dim"), HasSubstr("was absent")));
}

TEST_F(ModelSpecTest, AnEndTokenOutsideTheVocabularyIsRefused) {
  EXPECT_THAT(ErrorOfChanged([](Json* c) { (*c)["eos_token_id"] = 100000; }),
              HasSubstr("eos_token_id"));
}

TEST_F(ModelSpecTest, AConfigThatIsNoJsonIsRefused) {
  ASSERT_TRUE(WriteFileAtomically(llama() + "/config.json", "{").ok());
  EXPECT_THAT(std::string(ReadModelSpec(llama()).status().message()), HasSubstr("no valid JSON"));
}

}  // namespace
}  // namespace nestor
