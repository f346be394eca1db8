// What a kernel says of numbers that it finds in a tensor and can't take.
#pragma once

#include <sstream>
#include <stdexcept>

// std::invalid_argument reaches Python as ValueError with this text alone; STD_TORCH_CHECK's error
// would be a RuntimeError that begins with the name of a source file.
template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] inline void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}
