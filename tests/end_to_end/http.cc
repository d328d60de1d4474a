#include "tests/end_to_end/http.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nestor {
namespace {

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

std::string ReadToEnd(int descriptor) {
  std::string text;
  char buffer[4096];
  ssize_t size;
  while ((size = read(descriptor, buffer, sizeof(buffer))) > 0) text.append(buffer, size);
  return text;
}

}  // namespace

absl::StatusOr<std::string> HttpGet(int port, const std::string& path) {
  const int descriptor = socket(AF_INET, SOCK_STREAM, 0);
  NESTOR_CHECK(descriptor >= 0);
  const sockaddr_in address = Loopback(port);
  std::string answer;
  const std::string request =
      absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
  if (connect(descriptor, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0 &&
      write(descriptor, request.data(), request.size()) == static_cast<ssize_t>(request.size())) {
    answer = ReadToEnd(descriptor);
  }
  close(descriptor);
  const size_t body = answer.find("\r\n\r\n");
  if (!absl::StartsWith(answer, "HTTP/1.1 200") || body == std::string::npos) {
    return absl::UnavailableError(absl::StrCat("port ", port, path, ": ", answer));
  }
  return answer.substr(body + 4);
}

TakenPort::TakenPort() {
  descriptor_ = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  NESTOR_CHECK(descriptor_ >= 0);
  NESTOR_CHECK(bind(descriptor_, reinterpret_cast<sockaddr*>(&address), size) == 0);
  NESTOR_CHECK(listen(descriptor_, 1) == 0);
  NESTOR_CHECK(getsockname(descriptor_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  port_ = ntohs(address.sin_port);
}

TakenPort::~TakenPort() { close(descriptor_); }

}  // namespace nestor
