#pragma once

#include <cstdint>

namespace nestor {

// A panel of the middle plane: [groups] x 2 lines. Line k holds at byte b what lines 2 k (bits 0 to
// 3) and 2 k + 1 (bits 4 to 7) of a fine panel have there: the code of the low nibble in the lower
// two bits, that of the high nibble in the upper ones.
inline constexpr int64_t kMiddleGroupBytes = 128;

// Makes the fine panel that means the same: lo + 8 = 4 mid + 2. Plain loops, which compilers turn
// into vectors of the instruction set at hand; inline, so that each file has its own.
static inline void FineFromMiddle(const uint8_t* middle, int64_t groups, uint8_t* fine) {
  constexpr int64_t kLine = 64;
  for (int64_t line = 0; line < 2 * groups; ++line) {
    const uint8_t* codes = middle + line * kLine;
    uint8_t* even = fine + 2 * line * kLine;
    uint8_t* odd = even + kLine;
    for (int64_t b = 0; b < kLine; ++b) {
      const unsigned code = codes[b];
      even[b] = static_cast<uint8_t>((code << 2 & 0x0c) | (code << 4 & 0xc0) | 0x22);
      odd[b] = static_cast<uint8_t>((code >> 2 & 0x0c) | (code & 0xc0) | 0x22);
    }
  }
}

}  // namespace nestor
