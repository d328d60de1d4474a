#include "engine/unicode.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>
#include <unicode/stringpiece.h>
#include <unicode/uchar.h>
#include <unicode/utf8.h>

#include "base/check.h"

namespace nestor {
namespace {

const uint8_t* Bytes(std::string_view text) {
  return reinterpret_cast<const uint8_t*>(text.data());
}

const icu::Normalizer2& NormalizerOf(NormalizationForm form) {
  UErrorCode error = U_ZERO_ERROR;
  const icu::Normalizer2* normalizer = nullptr;
  switch (form) {
    case NormalizationForm::kNfc:
      normalizer = icu::Normalizer2::getNFCInstance(error);
      break;
    case NormalizationForm::kNfd:
      normalizer = icu::Normalizer2::getNFDInstance(error);
      break;
    case NormalizationForm::kNfkc:
      normalizer = icu::Normalizer2::getNFKCInstance(error);
      break;
    case NormalizationForm::kNfkd:
      normalizer = icu::Normalizer2::getNFKDInstance(error);
      break;
  }
  NESTOR_CHECK(U_SUCCESS(error) && normalizer != nullptr);
  return *normalizer;
}

// Whether `c` was assigned by version `version`.0 of Unicode.
bool IsInUnicode(int version, char32_t c) {
  UVersionInfo age;
  u_charAge(static_cast<UChar32>(c), age);
  return age[0] != 0 && age[0] <= version;
}

// The category of `c` in Unicode 8.0, as a mask; 0 where it was not assigned. With that version's
// tables Hugging Face's tokenizers clean and split text for BERT.
uint32_t CategoryInUnicode8(char32_t c) {
  if (!IsInUnicode(8, c)) return 0;
  switch (c) {
    // The characters in use here whose category has changed since.
    case 0x1734:  // a vowel killer
      return U_GC_MN_MASK;
    case 0x1885:  // Mongolian letters
    case 0x1886:
      return U_GC_LO_MASK;
    case 0xa9bd:  // a Javanese consonant sign
      return U_GC_MC_MASK;
    case 0x166d:   // Canadian syllabics' chi sign
    case 0x111c9:  // Sharada's sandhi mark
      return U_GC_PO_MASK;
    default:
      return U_GET_GC_MASK(static_cast<UChar32>(c));
  }
}

}  // namespace

bool IsValidUtf8(std::string_view text) {
  const uint8_t* bytes = Bytes(text);
  for (size_t i = 0; i < text.size();) {
    UChar32 c;
    U8_NEXT(bytes, i, text.size(), c);
    if (c < 0) return false;
  }
  return true;
}

char32_t NextCodePoint(std::string_view text, size_t* position) {
  const uint8_t* bytes = Bytes(text);
  UChar32 c;
  U8_NEXT_UNSAFE(bytes, *position, c);
  return static_cast<char32_t>(c);
}

void AppendUtf8(char32_t code_point, std::string* out) {
  char bytes[U8_MAX_LENGTH];
  size_t length = 0;
  U8_APPEND_UNSAFE(bytes, length, code_point);
  out->append(bytes, length);
}

size_t CountCodePoints(std::string_view text) {
  size_t count = 0;
  for (const char byte : text) count += !U8_IS_TRAIL(static_cast<uint8_t>(byte));
  return count;
}

size_t AppendLossyUtf8(std::string_view bytes, bool is_last, std::string* out) {
  const uint8_t* data = Bytes(bytes);
  size_t begin = 0;
  while (begin < bytes.size()) {
    size_t end = begin;
    UChar32 c;
    U8_NEXT(data, end, bytes.size(), c);
    if (c >= 0) {
      out->append(bytes.substr(begin, end - begin));
    } else if (!is_last && end == bytes.size() && U8_IS_LEAD(data[begin])) {
      break;
    } else {
      AppendUtf8(0xfffd, out);
    }
    begin = end;
  }
  return begin;
}

bool IsWhitespace(char32_t c) { return u_isUWhiteSpace(static_cast<UChar32>(c)); }

bool IsNumeric(char32_t c) {
  return (U_GET_GC_MASK(static_cast<UChar32>(c)) & (U_GC_ND_MASK | U_GC_NL_MASK | U_GC_NO_MASK)) !=
         0;
}

bool IsPunctuation(char32_t c) {
  if (c < 0x80) {
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
           (c >= '{' && c <= '~');
  }
  return (CategoryInUnicode8(c) & U_GC_P_MASK) != 0;
}

bool IsWordCharacter(char32_t c) {
  const UChar32 code_point = static_cast<UChar32>(c);
  return (U_GET_GC_MASK(code_point) & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK)) != 0 ||
         u_hasBinaryProperty(code_point, UCHAR_ALPHABETIC) ||
         u_hasBinaryProperty(code_point, UCHAR_JOIN_CONTROL);
}

bool IsControl(char32_t c) {
  return (CategoryInUnicode8(c) & (U_GC_CC_MASK | U_GC_CF_MASK | U_GC_CO_MASK)) != 0;
}

bool IsNonspacingMark(char32_t c) { return (CategoryInUnicode8(c) & U_GC_MN_MASK) != 0; }

bool IsMark(char32_t c) {
  return (U_GET_GC_MASK(static_cast<UChar32>(c)) & U_GC_M_MASK) != 0 && IsInUnicode(9, c);
}

std::string NormalizeUnicode(NormalizationForm form, std::string_view text) {
  std::string normalized;
  icu::StringByteSink<std::string> sink(&normalized, static_cast<int32_t>(text.size()));
  UErrorCode error = U_ZERO_ERROR;
  NormalizerOf(form).normalizeUTF8(
      0, icu::StringPiece(text.data(), static_cast<int32_t>(text.size())), sink, nullptr, error);
  NESTOR_CHECK(U_SUCCESS(error));
  return normalized;
}

std::string LowercaseCharacters(std::string_view text) {
  std::string lower;
  lower.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const char32_t c = NextCodePoint(text, &i);
    AppendUtf8(static_cast<char32_t>(u_tolower(static_cast<UChar32>(c))), &lower);
    // U+0130 is the only character whose lower case is two characters in every context.
    if (c == 0x0130) AppendUtf8(0x0307, &lower);
  }
  return lower;
}

}  // namespace nestor
