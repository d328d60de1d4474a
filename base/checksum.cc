#include "base/checksum.h"

#include <openssl/evp.h>

#include <memory>

#include "base/check.h"
#include "base/file.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

class Sha256Stream {
 public:
  Sha256Stream() : context_(EVP_MD_CTX_new(), &EVP_MD_CTX_free) {
    NESTOR_CHECK(context_ != nullptr);
    NESTOR_CHECK(EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
  }
  void Update(std::span<const std::byte> bytes) {
    NESTOR_CHECK(EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) == 1);
  }
  std::string Finish() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    NESTOR_CHECK(EVP_DigestFinal_ex(context_.get(), digest, &size) == 1);
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string text;
    for (unsigned int i = 0; i < size; ++i) {
      text += kDigits[digest[i] >> 4];
      text += kDigits[digest[i] & 15];
    }
    return text;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace

std::string Sha256(std::span<const std::byte> bytes) {
  Sha256Stream stream;
  stream.Update(bytes);
  return stream.Finish();
}

absl::StatusOr<std::string> Sha256OfFiles(std::span<const std::string> paths) {
  Sha256Stream stream;
  for (const std::string& path : paths) {
    NESTOR_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
    stream.Update(file.bytes());
  }
  return stream.Finish();
}

}  // namespace nestor
