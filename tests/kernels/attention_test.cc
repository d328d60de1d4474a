#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <ostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/bfloat16.h"
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
  Attention(const Device& device, const Heads& heads, bool has_cache, int64_t page_size = kPageSize,
            int64_t num_pages = kPages)
      : device_(device), heads_(heads) {
    if (has_cache) {
      EXPECT_TRUE(device_
                      ->AllocateKvCache({.num_layers = 2,
                                         .num_kv_heads = heads.kv_heads,
                                         .head_dim = heads.dim,
                                         .page_size = page_size,
                                         .num_pages = num_pages})
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

  std::vector<float> Run(const std::vector<Chunk>& chunks, const StepInput& input,
                         bool in_place = false) {
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
    const Tensor q = device_.Upload(input.q, rows, q_size);
    const Tensor out = in_place ? q : device_.Poisoned(rows, q_size);
    device_->Attention({.layer = 1,
                        .num_heads = heads_.heads,
                        .num_kv_heads = heads_.kv_heads,
                        .head_dim = heads_.dim,
                        .scale = 1 / std::sqrt(static_cast<float>(heads_.dim)),
                        .causal = heads_.causal,
                        .inverse_frequencies = frequencies_,
                        .q = q,
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

struct Variant {
  CpuInstructionSet instruction_set;
  KvCacheType type;
};

std::string NameOf(const Variant& variant) {
  return NameOf(variant.instruction_set) +
         (variant.type == KvCacheType::kBfloat16 ? "CacheInBf16" : "CacheInFp32");
}

void PrintTo(const Variant& variant, std::ostream* out) { *out << NameOf(variant); }

double NormOf(std::span<const double> values) {
  return std::sqrt(std::inner_product(values.begin(), values.end(), values.begin(), 0.0));
}

class CpuAttention : public ::testing::TestWithParam<Variant> {
 protected:
  static Device Cpu(int num_threads) {
    return Device::Cpu(GetParam().instruction_set, num_threads, GetParam().type);
  }

  // Scores and values have deviation 1, and outputs are means of values. fp32 keeps 1e-5. Rounding
  // to bf16 moves values, and with AVX-512 BF16 weights, by u / sqrt(3) = 2^-8 / sqrt(3) of
  // themselves at most (root mean square), keys and queries a score by as much each; weighted sums
  // of independent errors shrink as the sums of values do: u sqrt(4 / 3) of the outputs' norm. The
  // vector of one head deviates from that by less than 4 times.
  static void ExpectClose(const std::vector<float>& actual, const std::vector<float>& expected,
                          int64_t head_dim) {
    ASSERT_EQ(actual.size(), expected.size());
    if (GetParam().type == KvCacheType::kFloat32) {
      for (size_t i = 0; i < actual.size(); ++i) ASSERT_NEAR(actual[i], expected[i], 1e-5) << i;
      return;
    }
    const double tolerance = std::sqrt(4.0 / 3) / 256;
    std::vector<double> errors(actual.size());
    for (size_t i = 0; i < actual.size(); ++i) errors[i] = double{actual[i]} - expected[i];
    const std::vector<double> values(expected.begin(), expected.end());
    constexpr int64_t kMany = 64;  // vectors, over which chance evens out
    if (static_cast<int64_t>(errors.size()) >= kMany * head_dim) {
      EXPECT_LE(NormOf(errors), tolerance * NormOf(values));
    }
    for (size_t i = 0; i < errors.size(); i += head_dim) {
      ASSERT_LE(NormOf(std::span(errors).subspan(i, head_dim)),
                4 * tolerance * NormOf(std::span(values).subspan(i, head_dim)))
          << i;
    }
  }
};

// Several sequences of mixed lengths over many steps, on the device and on the reference.
void RunMixedSteps(Attention* attention, const Heads& heads,
                   const std::function<void(std::vector<float>*)>& prepare,
                   std::vector<std::vector<float>>* outputs) {
  const std::vector<int32_t> a = {7, 2, 19, 4, 11, 3, 0};  // up to 42 positions in pages of 6
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
    StepInput input = RandomInput(heads, rows, seed += 10);
    for (std::vector<float>* values : {&input.q, &input.k, &input.v}) prepare(values);
    outputs->push_back(attention->Run(step, input));
  }
}

TEST_P(CpuAttention, OverAPagedCacheEqualsTheReference) {
  for (const Heads& heads :
       {Heads{.heads = 9, .kv_heads = 3, .dim = 64}, Heads{.heads = 4, .kv_heads = 4, .dim = 10},
        Heads{.heads = 20, .kv_heads = 1, .dim = 8}, Heads{.heads = 8, .kv_heads = 2, .dim = 24},
        Heads{.heads = 6, .kv_heads = 2, .dim = 40, .has_rope = false},
        Heads{.heads = 8, .kv_heads = 1, .dim = 80}, Heads{.heads = 3, .kv_heads = 1, .dim = 128},
        Heads{.heads = 26, .kv_heads = 1, .dim = 16}}) {
    for (const int64_t page_size : {6, 16, 41}) {
      SCOPED_TRACE(testing::Message() << "dim " << heads.dim << ", pages of " << page_size);
      const Device cpu = Cpu(2);
      const Device reference = Device::Reference(false);
      Attention on_cpu(cpu, heads, true, page_size);
      Attention on_reference(reference, heads, true, page_size);
      std::vector<std::vector<float>> actual, expected;
      RunMixedSteps(
          &on_cpu, heads, [](std::vector<float>*) {}, &actual);
      RunMixedSteps(
          &on_reference, heads, [](std::vector<float>*) {}, &expected);
      for (size_t i = 0; i < actual.size(); ++i) ExpectClose(actual[i], expected[i], heads.dim);
    }
  }
}

// Where keys and values are numbers in bf16, a cache of that type loses nothing.
TEST_P(CpuAttention, OfNumbersInBf16IsExactInBothTypes) {
  if (GetParam().instruction_set == CpuInstructionSet::kAvx512Bf16 &&
      GetParam().type == KvCacheType::kBfloat16)
    GTEST_SKIP() << "rounds scaled queries and weights";
  const Heads heads = {.heads = 6, .kv_heads = 2, .dim = 40, .has_rope = false};
  const auto round = [](std::vector<float>* values) {
    for (float& value : *values) value = FloatFromBfloat16(Bfloat16FromFloat(value));
  };
  const Device cpu = Cpu(2);
  const Device reference = Device::Reference(false);
  Attention on_cpu(cpu, heads, true);
  Attention on_reference(reference, heads, true);
  std::vector<std::vector<float>> actual, expected;
  RunMixedSteps(&on_cpu, heads, round, &actual);
  RunMixedSteps(&on_reference, heads, round, &expected);
  for (size_t step = 0; step < actual.size(); ++step) {
    ASSERT_EQ(actual[step].size(), expected[step].size());
    for (size_t i = 0; i < actual[step].size(); ++i)
      ASSERT_NEAR(actual[step][i], expected[step][i], 1e-5) << step << " " << i;
  }
}

// 2,100 positions: several tiles of keys, whose maxima rise and fall.
TEST_P(CpuAttention, OfALongContextEqualsTheReference) {
  const Heads heads = {.heads = 3, .kv_heads = 1, .dim = 16};
  std::vector<int32_t> pages(132);
  std::iota(pages.rbegin(), pages.rend(), 0);
  const StepInput input = RandomInput(heads, 2101, 8);
  const Device cpu = Cpu(2);
  const Device reference = Device::Reference(false);
  Attention on_cpu(cpu, heads, true, 16, 132);
  Attention on_reference(reference, heads, true, 16, 132);
  for (const auto& [begin, end] : {std::pair(0, 1000), std::pair(1000, 2100), {2100, 2101}}) {
    const StepInput part = Slice(input, heads, begin, end);
    const std::vector<Chunk> step = {{begin, end - begin, pages}};
    ExpectClose(on_cpu.Run(step, part), on_reference.Run(step, part), heads.dim);
  }
}

TEST_P(CpuAttention, InChunksEqualsWhole) {
  const Heads heads = {.heads = 6, .kv_heads = 2, .dim = 16};
  std::vector<int32_t> pages(51);
  std::iota(pages.rbegin(), pages.rend(), 0);
  const int64_t rows = 305;  // three tiles of keys
  const StepInput input = RandomInput(heads, rows, 1);
  const Device cpu = Cpu(2);
  const std::vector<float> whole =
      Attention(cpu, heads, true, kPageSize, 51).Run({{0, rows, pages}}, input);
  for (const int64_t chunk : {1, 5, 16, 39, 304}) {
    const Device fresh = Cpu(2);
    Attention attention(fresh, heads, true, kPageSize, 51);
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

// As a round of speculation leaves the cache: what lies behind the rows is a rejected draft.
TEST_P(CpuAttention, OverwrittenPositionsLeaveNoTrace) {
  const Heads heads = {.heads = 3, .kv_heads = 1, .dim = 64};
  const std::vector<int32_t> pages = {0, 1, 2};
  const StepInput input = RandomInput(heads, 40, 1);
  const Device plain_device = Cpu(1);
  const Device drafted_device = Cpu(1);
  Attention plain(plain_device, heads, true, 16);
  Attention drafted(drafted_device, heads, true, 16);
  plain.Run({{0, 13, pages}}, Slice(input, heads, 0, 13));
  drafted.Run({{0, 13, pages}}, Slice(input, heads, 0, 13));
  drafted.Run({{13, 8, pages}}, RandomInput(heads, 8, 77));
  for (int64_t position = 13; position < 40; ++position) {
    const StepInput row = Slice(input, heads, position, position + 1);
    ASSERT_EQ(drafted.Run({{position, 1, pages}}, row), plain.Run({{position, 1, pages}}, row));
  }
}

TEST_P(CpuAttention, MayWriteOverItsQueries) {
  const Heads heads = {.heads = 6, .kv_heads = 2, .dim = 24};
  const std::vector<int32_t> pages = {0, 1, 2, 3, 4, 5, 6};
  const StepInput input = RandomInput(heads, 37, 3);
  const Device cpu = Cpu(2);
  const Device in_place = Cpu(2);
  EXPECT_EQ(Attention(in_place, heads, true).Run({{0, 37, pages}}, input, /*in_place=*/true),
            Attention(cpu, heads, true).Run({{0, 37, pages}}, input));
}

TEST_P(CpuAttention, ASequenceThatIsNotFiniteLeavesOthersAlone) {
  const Heads heads = {.heads = 3, .kv_heads = 1, .dim = 16};
  const std::vector<int32_t> a = {0, 1}, b = {2, 3}, c = {4, 5};
  const StepInput good = RandomInput(heads, 21, 4);
  for (const float bad_value :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    StepInput bad = good;
    std::fill_n(bad.k.begin() + 7 * 16, 7 * 16, bad_value);
    std::fill_n(bad.v.begin() + 7 * 16, 7 * 16, bad_value);
    const Device good_device = Cpu(2);
    const Device bad_device = Cpu(2);
    const std::vector<Chunk> step = {{0, 7, a}, {0, 7, b}, {0, 7, c}};
    std::vector<float> expected = Attention(good_device, heads, true).Run(step, good);
    std::vector<float> actual = Attention(bad_device, heads, true).Run(step, bad);
    for (int64_t i = 7 * 48; i < 14 * 48; ++i) ASSERT_FALSE(std::isfinite(actual[i])) << i;
    expected.erase(expected.begin() + 7 * 48, expected.begin() + 14 * 48);
    actual.erase(actual.begin() + 7 * 48, actual.begin() + 14 * 48);
    EXPECT_EQ(actual, expected);
  }
}

TEST_P(CpuAttention, ARowDoesNotDependOnWhoSharesTheStep) {
  const Heads heads = {.heads = 9, .kv_heads = 3, .dim = 64};
  const std::vector<int32_t> a = {0, 1, 2, 3};
  const std::vector<int32_t> b = {4, 5, 6, 7};
  const StepInput first = RandomInput(heads, 15, 1);
  const StepInput both = RandomInput(heads, 3, 4);
  const Device alone_device = Cpu(2);
  Attention alone(alone_device, heads, true, 16);
  alone.Run({{0, 15, b}}, first);
  const std::vector<float> expected = alone.Run({{15, 1, b}}, Slice(both, heads, 2, 3));
  const Device shared_device = Cpu(2);
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
    const Device cpu = Cpu(2);
    const Device reference = Device::Reference(false);
    ExpectClose(Attention(cpu, heads, false).Run(step, input),
                Attention(reference, heads, false).Run(step, input), heads.dim);
  }
}

TEST_P(CpuAttention, ReusedPagesKeepNothingOfTheirLastOwner) {
  const Heads heads = {.heads = 2, .kv_heads = 1, .dim = 8};
  const Device cpu = Cpu(1);
  const Device fresh = Cpu(1);
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
  const Device cpu = Cpu(2);
  EXPECT_TRUE(Attention(cpu, heads, true).Run({}, {}).empty());
}

TEST_P(CpuAttention, OfALongPromptOnManyThreadsEqualsTheReference) {
  const Heads heads = {.heads = 4, .kv_heads = 2, .dim = 16};
  std::vector<int32_t> pages(20);
  std::iota(pages.rbegin(), pages.rend(), 0);
  const StepInput input = RandomInput(heads, 117, 8);
  const Device cpu = Cpu(4);
  const Device reference = Device::Reference(false);
  ExpectClose(Attention(cpu, heads, true).Run({{0, 117, pages}}, input),
              Attention(reference, heads, true).Run({{0, 117, pages}}, input), heads.dim);
}

TEST_P(CpuAttention, CacheBytesAreThoseOfItsPages) {
  const int64_t scalar_bytes = GetParam().type == KvCacheType::kBfloat16 ? 2 : 4;
  const KvCacheShape shape = {
      .num_layers = 3, .num_kv_heads = 2, .head_dim = 64, .page_size = 16, .num_pages = 10};
  const Device cpu = Cpu(1);
  EXPECT_EQ(cpu->kv_cache_bytes(), 0);
  EXPECT_EQ(cpu->KvCacheBytes(shape), 3 * 2 * 64 * 16 * 10 * 2 * scalar_bytes);
  ASSERT_TRUE(cpu->AllocateKvCache(shape).ok());
  EXPECT_EQ(cpu->kv_cache_bytes(), cpu->KvCacheBytes(shape));
  // Blocks of 16 positions, heads of a multiple of 8.
  EXPECT_EQ(
      cpu->KvCacheBytes(
          {.num_layers = 1, .num_kv_heads = 1, .head_dim = 20, .page_size = 17, .num_pages = 1}),
      24 * 32 * 2 * scalar_bytes);
}

TEST_P(CpuAttention, RefusesACacheThatMemoryCannotHold) {
  const Device cpu = Cpu(1);
  const KvCacheShape shape = {.num_layers = 1000,
                              .num_kv_heads = 1000,
                              .head_dim = 1000,
                              .page_size = 16,
                              .num_pages = 100000};
  EXPECT_EQ(cpu->AllocateKvCache(shape).code(), absl::StatusCode::kResourceExhausted);
}

std::vector<Variant> RunnableVariants() {
  std::vector<Variant> variants;
  for (const CpuInstructionSet set : RunnableInstructionSets()) {
    for (const KvCacheType type : {KvCacheType::kBfloat16, KvCacheType::kFloat32})
      variants.push_back({set, type});
  }
  return variants;
}

INSTANTIATE_TEST_SUITE_P(Cpu, CpuAttention, ::testing::ValuesIn(RunnableVariants()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace nestor
