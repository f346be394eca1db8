// Whether this process may use AMX: the kernel's permission, and a trial. A virtual machine may
// advertise tiles and trap on them.
#pragma once

#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <initializer_list>

// A reason in words, which lives as long as the process; null if nothing is in the way.
using Reason = const char*;

inline Reason reason(const char* format, const char* what) {
  static char text[256];
  std::snprintf(text, sizeof text, format, what);
  return text;
}

// Linux gives a process the room for its tiles when asked, once for all threads.
inline Reason ask_for_tiles() {
  constexpr long kAskPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0) return nullptr;
  return reason("the kernel doesn't let this process use the processor's tiles (arch_prctl: %s)",
                std::strerror(errno));
}

// right(): whether instructions that may trap compute what they should. It is called in a child
// process, which it may end, and which ends after ten seconds at most.
inline Reason try_in_child(bool (*right)()) {
  const pid_t child = fork();
  if (child < 0) return reason("the tiles can't be tried (fork: %s)", std::strerror(errno));
  if (child == 0) {
    const rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    for (int s : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP, SIGALRM}) std::signal(s, SIG_DFL);
    sigset_t blocked;
    sigemptyset(&blocked);
    sigprocmask(SIG_SETMASK, &blocked, nullptr);
    alarm(10);
    _exit(right() ? 0 : 1);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return reason("a trial of tiles got lost (wait: %s)", std::strerror(errno));
  if (WIFSIGNALED(status))
    return reason("this machine advertises tiles, but a trial of them ended with: %s",
                  strsignal(WTERMSIG(status)));
  return WEXITSTATUS(status) == 0 ? nullptr : "a product of tiles was wrong in a trial";
}
