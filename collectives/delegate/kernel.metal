// The device's side of a delegated collective on Metal: WITH_PROXY of kernels.cu, word for word. MLX
// compiles it when it first runs; it wants macOS 15, whose shading language has memory that device
// and host both see while a kernel runs.
//
// Metal has no clock in a kernel, so the device's own bound is a number of looks; the proxy keeps the
// deadline, and its word `stop` ends the wait.
//
// NOT YET RUN: the machines it was written on have no Metal. `offbook doctor` proves it on a Mac.

#pragma METAL internals : enable

typedef volatile coherent(system) device ulong* Words;

constant uint STOP = 0;
constant uint GAVE_UP = 8;
constant uint DEAD = 24;
constant uint STOPPED = 1;
constant uint LATE = 2;
constant uint OVERRUN = 3;

inline uint pairs_of(uint bytes) {
  return bytes == 0 ? 1 : (bytes + 7) / 8;
}

// Eight bytes of an operand; past its end they are zeros.
inline ulong load_pair(const device uchar* from, uint pair, uint bytes) {
  ulong value = 0;
  for (uint i = 0; i < 8 && 8 * pair + i < bytes; ++i) {
    value |= ulong(from[8 * pair + i]) << (8 * i);
  }
  return value;
}

inline void store_pair(device uchar* to, uint pair, uint bytes, ulong value) {
  for (uint i = 0; i < 8 && 8 * pair + i < bytes; ++i) {
    to[8 * pair + i] = uchar(value >> (8 * i));
  }
}

// Waits until both words of a pair are of this operation. Returns why it gave up, or 0.
inline uint await_pair(Words words, uint at, uint sequence, uint looks_max, thread ulong& data) {
  for (uint looks = 1;; ++looks) {
    ulong a = words[at];
    ulong b = words[at + 1];
    int ahead_a = int(uint(a >> 32) - sequence);
    int ahead_b = int(uint(b >> 32) - sequence);
    if ((ahead_a | ahead_b) == 0) {
      data = (a & 0xFFFFFFFF) | (b << 32);
      return 0;
    }
    if (ahead_a > 0 || ahead_b > 0) {
      return OVERRUN;
    }
    if (looks % 32 == 0 && (words[STOP] | words[DEAD]) != 0) {
      return STOPPED;
    }
    if (looks == looks_max) {
      return LATE;
    }
  }
}

//---- the body of the kernel, whose signature MLX writes

  uint first = thread_position_in_grid.x;
  uint stride = threads_per_grid.x;
  Words words = (Words)memory;
  const device uchar* in = (const device uchar*)operand;
  device uchar* out = (device uchar*)result;
  uint in_bytes = scalars[0];
  uint out_bytes = scalars[1];
  uint looks_max = scalars[2];
  uint sequence = scalars[3];
  uint who = scalars[4];
  uint up = scalars[5];
  uint down = scalars[6];
  ulong stamp = ulong(sequence) << 32;

  uint why = words[DEAD] != 0 ? STOPPED : 0;
  if (why == 0) {
    for (uint pair = first; pair < pairs_of(in_bytes); pair += stride) {
      ulong data = load_pair(in, pair, in_bytes);
      words[up + 2 * pair] = stamp | (data & 0xFFFFFFFF);
      words[up + 2 * pair + 1] = stamp | (data >> 32);
    }
  }
  for (uint pair = first; pair < pairs_of(out_bytes); pair += stride) {
    ulong data = 0;
    if (why == 0) {
      why = await_pair(words, down + 2 * pair, sequence, looks_max, data);
    }
    store_pair(out, pair, out_bytes, why == 0 ? data : 0);
  }
  if (why != 0) {
    if (why != STOPPED) {
      words[GAVE_UP] = stamp | (who & 0xFFFF0000) | (who & 0xFF00) | why;
    }
    words[DEAD] = 1;
  }
  if (first == 0) {
    next_token[0] = sequence;
  }
