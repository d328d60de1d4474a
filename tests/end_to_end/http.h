#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace nestor {

// The body of http://127.0.0.1:`port``path`. UNAVAILABLE where nobody answers or the answer is
// not 200.
absl::StatusOr<std::string> HttpGet(int port, const std::string& path);

// A TCP socket that listens on a free loopback port, so that it is taken. Closed at the end.
class TakenPort {
 public:
  TakenPort();
  ~TakenPort();
  TakenPort(const TakenPort&) = delete;
  TakenPort& operator=(const TakenPort&) = delete;

  int port() const { return port_; }

 private:
  int descriptor_ = -1;
  int port_ = 0;
};

}  // namespace nestor
