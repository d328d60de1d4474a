#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace nestor {

// UTF-8 and the Unicode properties that tokenisers ask for, from ICU's tables. Where Hugging Face's
// tokenizers use tables of an older version, later characters have no category here either. Pure
// functions.

bool IsValidUtf8(std::string_view text);
// The character that starts at `*position`, which moves past it.
// REQUIRES: `text` is valid UTF-8 and *position is the start of a character.
char32_t NextCodePoint(std::string_view text, size_t* position);
void AppendUtf8(char32_t code_point, std::string* out);
size_t CountCodePoints(std::string_view text);

// Appends `bytes` to `out`, every maximal invalid part replaced by U+FFFD. A character that only
// lacks its last bytes stays out unless `is_last`. Returns how many bytes were consumed.
size_t AppendLossyUtf8(std::string_view bytes, bool is_last, std::string* out);

bool IsWhitespace(char32_t c);      // White_Space
bool IsNumeric(char32_t c);         // Nd, Nl, No
bool IsPunctuation(char32_t c);     // P* of Unicode 8, and every ASCII symbol
bool IsWordCharacter(char32_t c);   // UTS 18's \w
bool IsControl(char32_t c);         // Cc, Cf, Co of Unicode 8
bool IsNonspacingMark(char32_t c);  // Mn of Unicode 8
bool IsMark(char32_t c);            // Mn, Mc, Me of Unicode 9

enum class NormalizationForm { kNfc, kNfd, kNfkc, kNfkd };
// REQUIRES: `text` is valid UTF-8.
std::string NormalizeUnicode(NormalizationForm form, std::string_view text);
// Every character mapped on its own: no final sigma, no locale.
std::string LowercaseCharacters(std::string_view text);

}  // namespace nestor
