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

TEST_F(ModelSpecTest, ABertClassifierIsDescribedWithItsLabels) {
  const std::string path = bert() + "/config.json";
  const Json bert_config = Json::parse(*ReadFile(path));
  const auto read = [&](const Json& changes) {
    Json config = bert_config;
    config["architectures"] = {"BertForSequenceClassification"};
    config.update(changes);
    EXPECT_TRUE(WriteFileAtomically(path, config.dump()).ok());
    return ReadModelSpec(bert());
  };
  auto spec = read({{"id2label", {{"0", "no"}, {"1", "perhaps"}, {"2", "yes"}}}});
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_TRUE(spec->is_encoder());
  EXPECT_TRUE(spec->is_classifier());
  EXPECT_THAT(spec->classifier.labels, ElementsAre("no", "perhaps", "yes"));
  EXPECT_EQ(spec->output_size(), 3);
  // The stages of sentence-transformers are not its own.
  EXPECT_EQ(spec->pooling, PoolingKind::kCls);
  EXPECT_FALSE(spec->normalises_embedding);
  spec = read(Json::object());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_THAT(spec->classifier.labels, ElementsAre("LABEL_0", "LABEL_1"));
  EXPECT_THAT(std::string(read({{"id2label", {{"0", "only"}}}}).status().message()),
              AllOf(HasSubstr("id2label"), HasSubstr("two labels or more")));
  EXPECT_THAT(std::string(read({{"id2label", {{"0", "a"}, {"2", "b"}}}}).status().message()),
              HasSubstr("id2label.1: expected the label's name"));
  EXPECT_THAT(std::string(read({{"problem_type", "regression"}}).status().message()),
              HasSubstr("problem_type: \"regression\" is not supported"));
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

class Gpt2SpecTest : public ::testing::Test {
 protected:
  absl::StatusOr<ModelSpec> Read(const std::function<void(Json*)>& change) const {
    Json config = {{"architectures", {"GPT2LMHeadModel"}},
                   {"n_layer", 2},
                   {"n_embd", 24},
                   {"n_head", 3},
                   {"n_positions", 64},
                   {"vocab_size", 100},
                   {"layer_norm_epsilon", 1e-5},
                   {"activation_function", "gelu_new"},
                   {"eos_token_id", 99}};
    change(&config);
    EXPECT_TRUE(WriteFileAtomically(directory_.path() + "/config.json", config.dump()).ok());
    return ReadModelSpec(directory_.path());
  }
  std::string Error(const std::function<void(Json*)>& change) const {
    return std::string(Read(change).status().message());
  }

  const TemporaryDirectory directory_;
};

TEST_F(Gpt2SpecTest, ItsOwnKeysAreRead) {
  const auto spec = Read([](Json*) {});
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->head_dim, 8);
  EXPECT_EQ(spec->num_kv_heads, 3);
  EXPECT_EQ(spec->mlp_size, 96);
  EXPECT_EQ(spec->context_length, 64);
  EXPECT_EQ(spec->activation, ActivationKind::kGeluTanh);
  EXPECT_EQ(spec->rope_theta, 0);
  EXPECT_TRUE(spec->tied_head);
  EXPECT_THAT(spec->end_tokens, ElementsAre(99));
  const auto old = Read([](Json* c) {
    c->erase("n_positions");
    c->erase("activation_function");
    (*c)["n_ctx"] = 32;
    (*c)["n_inner"] = 44;
  });
  ASSERT_TRUE(old.ok()) << old.status();
  EXPECT_EQ(old->context_length, 32);
  EXPECT_EQ(old->mlp_size, 44);
  EXPECT_EQ(old->activation, ActivationKind::kGeluTanh);
}

TEST_F(Gpt2SpecTest, ItsLayersComeFromTransposedAndSharedTensors) {
  const std::vector<LinearSpec> layers = LayersOf(*Read([](Json*) {}));
  ASSERT_EQ(layers.size(), 2u * 6 + 1);
  const LinearSpec& value = layers[8];
  EXPECT_EQ(value.name, "h.1.attn.c_attn.value");
  EXPECT_EQ(value.source.name, "h.1.attn.c_attn");
  EXPECT_EQ(value.source.num_outputs, 72);
  EXPECT_EQ(value.source.first_output, 48);
  EXPECT_TRUE(value.source.is_transposed);
  EXPECT_EQ(layers[10].source.name, "h.1.mlp.c_fc");
  EXPECT_EQ(layers[10].source.num_outputs, 96);
  EXPECT_EQ(layers[12].source.name, "wte");
  EXPECT_FALSE(layers[12].source.is_transposed);
}

TEST_F(Gpt2SpecTest, VariantsThatChangeTheResultAreNotSupported) {
  for (const auto& [key, value] :
       {std::pair("scale_attn_weights", false), std::pair("scale_attn_by_inverse_layer_idx", true),
        std::pair("add_cross_attention", true)}) {
    const auto spec = Read([&](Json* c) { (*c)[key] = value; });
    EXPECT_TRUE(absl::IsUnimplemented(spec.status())) << spec.status();
    EXPECT_THAT(std::string(spec.status().message()),
                AllOf(HasSubstr("config.json"), HasSubstr(key)));
  }
  EXPECT_TRUE(Read([](Json* c) { (*c)["reorder_and_upcast_attn"] = true; }).ok());
}

TEST_F(Gpt2SpecTest, BadValuesAreNamed) {
  EXPECT_THAT(
      Error([](Json* c) { (*c)["n_head"] = 5; }),
      AllOf(HasSubstr("config.json: n_head"), HasSubstr("n_embd (24)"), HasSubstr("was 5")));
  EXPECT_THAT(Error([](Json* c) { c->erase("n_positions"); }),
              AllOf(HasSubstr("config.json: n_positions"), HasSubstr("absent")));
  EXPECT_THAT(Error([](Json* c) { (*c)["activation_function"] = "relu"; }),
              AllOf(HasSubstr("activation_function: \"relu\""), HasSubstr("gelu_new")));
}

}  // namespace
}  // namespace nestor
