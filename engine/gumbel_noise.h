#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace nestor {

// Gumbel noise for every token of one draw, a pure function of (seed, index, token).
//
// Gumbel-max (Gumbel 1954; Maddison, Tarlow, Minka 2014, arXiv 1411.0030): with independent
// G = -log(E), E exponential, argmax(x_i + G_i) is distributed as softmax(x). Two draws that share
// the noise are coupled without knowing of each other: from distributions p and q they agree with
// a probability of at least (1 - TV) / (1 + TV), TV their total variation distance (Daliri, Musco,
// Suresh 2024, arXiv 2408.07978).
//
// A block of kBlock tokens is built from its winner: the least of n exponentials is E / n, it falls
// to each of them equally often, and the others exceed it by exponentials of their own, since these
// have no memory. So one hash bounds the noise of a whole block.
class GumbelNoise {
 public:
  static constexpr int32_t kBlock = 16;

  GumbelNoise(uint64_t seed, uint64_t index) : key_(Hash(Hash(seed, 0), index)) {}

  double Of(int32_t token) const {
    const uint64_t block = BitsOfBlock(token / kBlock);
    double exponential = Exponential(block) / kBlock;
    if (static_cast<uint64_t>(token % kBlock) != block % kBlock) {
      exponential += Exponential(Hash(key_, kTokens + static_cast<uint64_t>(token)));
    }
    return -std::log(exponential);
  }

  // At least Of(token) for every token in [kBlock * block, kBlock * (block + 1)), by less than
  // log(2): an exponential of these bits is at least the fraction that they spell.
  double BoundOf(int32_t block) const {
    const int log2_of_fraction = -1 - std::countl_zero(BitsOfBlock(block));
    return (std::bit_width(static_cast<uint32_t>(kBlock)) - 1 - log2_of_fraction) *
           std::numbers::ln2;
  }

 private:
  // Tokens draw from the hash's indices above those of blocks.
  static constexpr uint64_t kTokens = uint64_t{1} << 32;

  // The number at `index` of SplitMix64 (Steele, Lea, Flood 2014) that starts at `key`.
  static uint64_t Hash(uint64_t key, uint64_t index) {
    uint64_t z = key + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  // Of the upper 52 bits; never 0.
  static double Exponential(uint64_t bits) {
    return -std::log1p(-(static_cast<double>(bits >> 12) + 0.5) * 0x1p-52);
  }

  // The upper bits make the winner's exponential, the lowest say who the winner is.
  uint64_t BitsOfBlock(int32_t block) const { return Hash(key_, static_cast<uint64_t>(block)); }

  const uint64_t key_;
};

}  // namespace nestor
