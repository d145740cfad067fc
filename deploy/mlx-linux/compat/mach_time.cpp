// mlx-rs seeds its generator with the clock of macOS; here is the same clock, by its Linux name.
#include <stdint.h>
#include <time.h>
extern "C" uint64_t mach_approximate_time(void) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return uint64_t(now.tv_sec) * 1000000000u + uint64_t(now.tv_nsec);
}
