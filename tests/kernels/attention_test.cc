#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/device.h"

namespace nestor {
namespace {

struct Heads {
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t dim = 0;
  bool causal = true;
  bool has_rope = true;
};

// One sequence in a step: rows at `position`, in these pages.
struct Chunk {
  int64_t position = 0;
  int64_t rows = 0;
  std::vector<int32_t> pages;
};

// Activations of one step, the same for every device.
struct StepInput {
  std::vector<float> q, k, v;
};

constexpr int64_t kPageSize = 6;  // no multiple of a vector
constexpr int64_t kPages = 20;

// One device with its cache, through which steps run one after the other.
class Attention {
 public:
  Attention(const Device& device, const Heads& heads, bool has_cache, int64_t page_size = kPageSize)
      : device_(device), heads_(heads) {
    if (has_cache) {
      EXPECT_TRUE(device_
                      ->AllocateKvCache({.num_layers = 2,
                                         .num_kv_heads = heads.kv_heads,
                                         .head_dim = heads.dim,
                                         .page_size = page_size,
                                         .num_pages = kPages})
                      .ok());
    }
    if (heads.has_rope) {
      std::vector<float> frequencies;
      for (int64_t i = 0; i < heads.dim / 2; ++i)
        frequencies.push_back(
            std::pow(100.0f, -2.0f * static_cast<float>(i) / static_cast<float>(heads.dim)));
      frequencies_ = device_->LoadVector(frequencies).value();
    }
  }

  std::vector<float> Run(const std::vector<Chunk>& chunks, const StepInput& input) {
    int64_t rows = 0;
    std::vector<SequenceRows> sequences;
    for (const Chunk& chunk : chunks) {
      sequences.push_back({.row_begin = rows,
                           .rows = chunk.rows,
                           .position = chunk.position,
                           .pages = chunk.pages});
      rows += chunk.rows;
    }
    const int64_t q_size = heads_.heads * heads_.dim;
    const int64_t kv_size = heads_.kv_heads * heads_.dim;
    const Tensor out = device_.Poisoned(rows, q_size);
    device_->Attention({.layer = 1,
                        .num_heads = heads_.heads,
                        .num_kv_heads = heads_.kv_heads,
                        .head_dim = heads_.dim,
                        .scale = 1 / std::sqrt(static_cast<float>(heads_.dim)),
                        .causal = heads_.causal,
                        .inverse_frequencies = frequencies_,
                        .q = device_.Upload(input.q, rows, q_size),
                        .k = device_.Upload(input.k, rows, kv_size),
                        .v = device_.Upload(input.v, rows, kv_size),
                        .out = out,
                        .sequences = sequences});
    return device_.Download(out);
  }

 private:
  const Device& device_;
  const Heads heads_;
  VectorId frequencies_ = kNone;
};

StepInput RandomInput(const Heads& heads, int64_t rows, uint32_t seed) {
  return {.q = RandomFloats(rows * heads.heads * heads.dim, seed),
          .k = RandomFloats(rows * heads.kv_heads * heads.dim, seed + 1),
          .v = RandomFloats(rows * heads.kv_heads * heads.dim, seed + 2)};
}

// Rows [begin, end) of an input.
StepInput Slice(const StepInput& input, const Heads& heads, int64_t begin, int64_t end) {
  const auto rows = [&](const std::vector<float>& values, int64_t cols) {
    return std::vector<float>(values.begin() + begin * cols, values.begin() + end * cols);
  };
  return {.q = rows(input.q, heads.heads * heads.dim),
          .k = rows(input.k, heads.kv_heads * heads.dim),
          .v = rows(input.v, heads.kv_heads * heads.dim)};
}

// Outputs are means of values of deviation 1; scores are of magnitude 1, so fp32 keeps 1e-5.
void ExpectClose(const std::vector<float>& actual, const std::vector<float>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) ASSERT_NEAR(actual[i], expected[i], 1e-5) << i;
}

class CpuAttention : public ::testing::TestWithParam<CpuInstructionSet> {};

TEST_P(CpuAttention, OverAPagedCacheEqualsTheReference) {
  for (const Heads& heads :
       {Heads{.heads = 9, .kv_heads = 3, .dim = 16}, Heads{.heads = 4, .kv_heads = 4, .dim = 10},
        Heads{.heads = 20, .kv_heads = 1, .dim = 8},
        Heads{.heads = 6, .kv_heads = 2, .dim = 40, .has_rope = false}}) {
    const Device cpu = Device::Cpu(GetParam(), 2);
    const Device reference = Device::Reference(false);
    Attention on_cpu(cpu, heads, true);
    Attention on_reference(reference, heads, true);
    const std::vector<int32_t> a = {7, 2, 19, 4, 11, 3, 0};  // up to 42 positions
    const std::vector<int32_t> b = {1, 5};
    const std::vector<std::vector<Chunk>> steps = {
        {{0, 23, a}},
        {{23, 1, a}, {0, 7, b}},
        {{24, 14, a}, {7, 1, b}},
        {{38, 1, a}, {8, 2, b}},
    };
    uint32_t seed = 0;
    for (const std::vector<Chunk>& step : steps) {
      int64_t rows = 0;
      for (const Chunk& chunk : step) rows += chunk.rows;
      const StepInput input = RandomInput(heads, rows, seed += 10);
      ExpectClose(on_cpu.Run(step, input), on_reference.Run(step, input));
    }
  }
}

TEST_P(CpuAttention, InChunksEqualsWhole) {
  const Heads heads = {.heads = 6, .kv_heads = 2, .dim = 16};
  const std::vector<int32_t> pages = {3, 1, 2, 5, 9, 8, 0};
  const int64_t rows = 40;
  const StepInput input = RandomInput(heads, rows, 1);
  const Device cpu = Device::Cpu(GetParam(), 2);
  const std::vector<float> whole = Attention(cpu, heads, true).Run({{0, rows, pages}}, input);
  for (const int64_t chunk : {1, 5, 16, 39}) {
    const Device fresh = Device::Cpu(GetParam(), 2);
    Attention attention(fresh, heads, true);
    std::vector<float> result;
    for (int64_t begin = 0; begin < rows; begin += chunk) {
      const int64_t end = std::min(rows, begin + chunk);
      const std::vector<float> part =
          attention.Run({{begin, end - begin, pages}}, Slice(input, heads, begin, end));
      result.insert(result.end(), part.begin(), part.end());
    }
    ASSERT_EQ(result, whole) << chunk;  // bit for bit
  }
}

TEST_P(CpuAttention, ARowDoesNotDependOnWhoSharesTheStep) {
  const Heads heads = {.heads = 9, .kv_heads = 3, .dim = 64};
  const std::vector<int32_t> a = {0, 1, 2, 3};
  const std::vector<int32_t> b = {4, 5, 6, 7};
  const StepInput first = RandomInput(heads, 15, 1);
  const StepInput both = RandomInput(heads, 3, 4);
  const Device alone_device = Device::Cpu(GetParam(), 2);
  Attention alone(alone_device, heads, true, 16);
  alone.Run({{0, 15, b}}, first);
  const std::vector<float> expected = alone.Run({{15, 1, b}}, Slice(both, heads, 2, 3));
  const Device shared_device = Device::Cpu(GetParam(), 2);
  Attention shared(shared_device, heads, true, 16);
  shared.Run({{0, 15, b}}, first);
  const std::vector<float> together = shared.Run({{0, 2, a}, {15, 1, b}}, both);
  EXPECT_EQ(std::vector<float>(together.begin() + 2 * 9 * 64, together.end()), expected);
}

TEST_P(CpuAttention, WithoutACacheEqualsTheReference) {
  for (const Heads& heads :
       {Heads{.heads = 12, .kv_heads = 12, .dim = 32, .causal = false, .has_rope = false},
        Heads{.heads = 4, .kv_heads = 2, .dim = 12, .causal = false},
        Heads{.heads = 4, .kv_heads = 2, .dim = 12, .causal = true}}) {
    const std::vector<Chunk> step = {{0, 15, {}}, {0, 1, {}}, {0, 37, {}}, {0, 8, {}}};
    const StepInput input = RandomInput(heads, 61, 5);
    const Device cpu = Device::Cpu(GetParam(), 2);
    const Device reference = Device::Reference(false);
    ExpectClose(Attention(cpu, heads, false).Run(step, input),
                Attention(reference, heads, false).Run(step, input));
  }
}

TEST_P(CpuAttention, ReusedPagesKeepNothingOfTheirLastOwner) {
  const Heads heads = {.heads = 2, .kv_heads = 1, .dim = 8};
  const Device cpu = Device::Cpu(GetParam(), 1);
  const Device fresh = Device::Cpu(GetParam(), 1);
  Attention used(cpu, heads, true);
  StepInput bad = RandomInput(heads, 12, 1);
  std::fill(bad.k.begin(), bad.k.end(), std::numeric_limits<float>::quiet_NaN());
  std::fill(bad.v.begin(), bad.v.end(), std::numeric_limits<float>::infinity());
  const std::vector<float> failed = used.Run({{0, 12, {0, 1}}}, bad);
  EXPECT_TRUE(std::isnan(failed[0]));
  const StepInput good = RandomInput(heads, 3, 2);
  EXPECT_EQ(used.Run({{0, 3, {1}}}, good), Attention(fresh, heads, true).Run({{0, 3, {1}}}, good));
}

TEST_P(CpuAttention, OfNoSequencesDoesNothing) {
  const Heads heads = {.heads = 2, .kv_heads = 1, .dim = 8};
  const Device cpu = Device::Cpu(GetParam(), 2);
  EXPECT_TRUE(Attention(cpu, heads, true).Run({}, {}).empty());
}

TEST_P(CpuAttention, OfALongPromptOnManyThreadsEqualsTheReference) {
  const Heads heads = {.heads = 4, .kv_heads = 2, .dim = 16};
  std::vector<int32_t> pages(20);
  std::iota(pages.rbegin(), pages.rend(), 0);
  const StepInput input = RandomInput(heads, 117, 8);
  const Device cpu = Device::Cpu(GetParam(), 4);
  const Device reference = Device::Reference(false);
  ExpectClose(Attention(cpu, heads, true).Run({{0, 117, pages}}, input),
              Attention(reference, heads, true).Run({{0, 117, pages}}, input));
}

TEST_P(CpuAttention, CacheBytesAreThoseOfItsPages) {
  const Device cpu = Device::Cpu(GetParam(), 1);
  EXPECT_EQ(cpu->kv_cache_bytes(), 0);
  ASSERT_TRUE(
      cpu->AllocateKvCache(
             {.num_layers = 3, .num_kv_heads = 2, .head_dim = 64, .page_size = 16, .num_pages = 10})
          .ok());
  EXPECT_EQ(cpu->kv_cache_bytes(), 3 * 2 * 64 * 16 * 10 * 2 * 4);
}

TEST_P(CpuAttention, RefusesACacheThatMemoryCannotHold) {
  const Device cpu = Device::Cpu(GetParam(), 1);
  const KvCacheShape shape = {.num_layers = 1000,
                              .num_kv_heads = 1000,
                              .head_dim = 1000,
                              .page_size = 16,
                              .num_pages = 100000};
  EXPECT_EQ(cpu->AllocateKvCache(shape).code(), absl::StatusCode::kResourceExhausted);
}

INSTANTIATE_TEST_SUITE_P(Cpu, CpuAttention, ::testing::ValuesIn(RunnableInstructionSets()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace nestor
