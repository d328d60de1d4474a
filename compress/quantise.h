#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace nestor {

// Codes as docs/artifact_format.md defines them. Every function is pure.

class ErrorFeedback;

// One weight matrix split into two 4-bit planes: w = s (16 hi + lo), q = 16 hi + lo in [-128, 119];
// and two bits that refine the coarse one on their own.
struct Planes {
  int64_t out = 0;
  int64_t in = 0;
  std::vector<uint8_t> coarse;   // [out, PaddedToGroup(in) / 2], hi + 8
  std::vector<uint8_t> fine;     // [out, PaddedToGroup(in) / 2], lo + 8
  std::vector<uint8_t> middle;   // [out, PaddedToGroup(in) / 4], mid of s (16 hi + 4 mid - 6)
  std::vector<uint16_t> scales;  // bf16 [out, NumGroups(in)]
};

// hi and lo of a code q in [-128, 119].
struct SplitCode {
  int hi = 0;  // floor((q + 8) / 16), in [-8, 7]
  int lo = 0;  // q - 16 hi, in [-8, 7]
};
SplitCode Split(int code);

// Quantises `weights` [out, in] in groups of 32 inputs. A group's scale is bf16(absmax / 119). With
// `input_energies` [in] (E[x_j^2], the diagonal of the second moment) it is the one whose planes
// have the smallest error weighted by them, the full one's counted sixteen times, among those that
// give the extreme weight a code in [95, 125] or [-134, -103]. So it may be negative, which lets
// the extreme have the outermost code of either side, and may clip it.
// hi and lo are those nearest to each weight; with `feedback`, hi is chosen for the coarse plane's
// output, within one fine step of what lo can reach, and lo then for the sum's; so is mid, which
// is made beside lo and does not bear on it.
// REQUIRES: weights are finite.
Planes QuantisePlanes(std::span<const float> weights, int64_t out, int64_t in,
                      std::span<const float> input_energies = {},
                      const ErrorFeedback* feedback = nullptr);

// out[i, j] = 16 s hi, s (16 hi + 4 mid - 6), or s (16 hi + lo). [out, in] without padding.
std::vector<float> DequantiseCoarse(const Planes& planes);
std::vector<float> DequantiseMiddle(const Planes& planes);
std::vector<float> DequantiseDense(const Planes& planes);

// `rank` rows of `size` values as int8 in groups of 32, scale bf16(absmax / 127).
struct FactorCodes {
  int64_t rank = 0;
  int64_t size = 0;
  std::vector<int8_t> codes;     // [rank, PaddedToGroup(size)], padding is 0
  std::vector<uint16_t> scales;  // bf16 [rank, NumGroups(size)]
};

FactorCodes QuantiseFactor(std::span<const float> values, int64_t rank, int64_t size);
std::vector<float> DequantiseFactor(const FactorCodes& factor);  // [rank, size]

}  // namespace nestor
