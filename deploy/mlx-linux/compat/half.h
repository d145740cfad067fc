// mlx-c declares its half types on Arm alone, and mlx-rs needs them everywhere: on x86-64 both
// travel as their 16 bits. Included before anything else, this takes the place of mlx/c/half.h.
#pragma once
#if !defined(__aarch64__)
#define MLX_HALF_H
#define HAS_FLOAT16
#define HAS_BFLOAT16
#include <stdint.h>
typedef uint16_t float16_t;
typedef uint16_t bfloat16_t;
#endif
