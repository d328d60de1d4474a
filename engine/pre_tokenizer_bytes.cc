#include "engine/pre_tokenizer_bytes.h"

#include <array>

#include "engine/unicode.h"

namespace nestor {
namespace {

// 188 bytes are printable and 68 are not: the alphabet ends at U+0143.
constexpr int kNumAlphabetCodePoints = 256 + 68;

struct ByteAlphabet {
  std::array<char32_t, 256> character_of_byte{};
  std::array<int16_t, kNumAlphabetCodePoints> byte_of_character{};
};

constexpr ByteAlphabet MakeByteAlphabet() {
  ByteAlphabet alphabet;
  for (int16_t& byte : alphabet.byte_of_character) byte = -1;
  char32_t next_free = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool is_printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) ||
                              (byte >= 0xae && byte <= 0xff);
    const char32_t character = is_printable ? static_cast<char32_t>(byte) : next_free++;
    alphabet.character_of_byte[byte] = character;
    alphabet.byte_of_character[character] = static_cast<int16_t>(byte);
  }
  return alphabet;
}

constexpr ByteAlphabet kAlphabet = MakeByteAlphabet();

}  // namespace

std::string ByteLevelText(std::string_view text) {
  std::string mapped;
  mapped.reserve(text.size() * 2);
  for (const char byte : text) {
    AppendUtf8(kAlphabet.character_of_byte[static_cast<uint8_t>(byte)], &mapped);
  }
  return mapped;
}

bool AppendBytesOfByteLevelText(std::string_view text, std::string* bytes) {
  const size_t begin = bytes->size();
  for (size_t i = 0; i < text.size();) {
    const char32_t c = NextCodePoint(text, &i);
    if (c >= kNumAlphabetCodePoints || kAlphabet.byte_of_character[c] < 0) {
      bytes->resize(begin);
      return false;
    }
    *bytes += static_cast<char>(kAlphabet.byte_of_character[c]);
  }
  return true;
}

}  // namespace nestor
