//! Vectors as processors have them. A kernel is written once over [`Processor`] and compiled for each;
//! which one runs is decided when it is called. Inside a kernel nothing that touches vectors may be a
//! closure: closures are compiled without the processor's instructions.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64 as x86;

/// What processors do differently. A vector has [`LANES`] lanes.
pub(super) trait Processor {
    type Vector: Copy;

    fn splat(value: f32) -> Self::Vector;
    fn load(values: &[f32; LANES]) -> Self::Vector;
    fn store(vector: Self::Vector, values: &mut [f32; LANES]);
    /// `a · b + c`.
    fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// As many codes as lanes, the first in the lowest bits.
    fn spread(codes: u64, bits: u32) -> Self::Vector;

    /// As many codes of 8 bits as lanes, the first in the lowest bits.
    fn widen(codes: [u32; 2]) -> Self::Vector;

    /// All lanes, always in the same order.
    #[inline(always)]
    fn sum(vector: Self::Vector) -> f32 {
        let mut lanes = [0.0; LANES];
        Self::store(vector, &mut lanes);
        let [a, b, c, d, e, f, g, h] = lanes;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}

/// Any processor.
pub(super) struct Plain;

impl Processor for Plain {
    type Vector = [f32; LANES];

    #[inline(always)]
    fn splat(value: f32) -> Self::Vector {
        [value; LANES]
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self::Vector {
        *values
    }

    #[inline(always)]
    fn store(vector: Self::Vector, values: &mut [f32; LANES]) {
        *values = vector;
    }

    #[inline(always)]
    fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        std::array::from_fn(|lane| match cfg!(target_arch = "aarch64") {
            true => a[lane].mul_add(b[lane], c[lane]),
            // Without an instruction for it, fusing would be a function call.
            false => a[lane] * b[lane] + c[lane],
        })
    }

    #[inline(always)]
    fn spread(codes: u64, bits: u32) -> Self::Vector {
        let mask = (1 << bits) - 1;
        std::array::from_fn(|lane| ((codes >> (lane as u32 * bits)) & mask) as f32)
    }

    #[inline(always)]
    fn widen(codes: [u32; 2]) -> Self::Vector {
        std::array::from_fn(|lane| ((codes[lane / 4] >> (lane % 4 * 8)) & 0xff) as f32)
    }
}

/// AVX2, FMA and BMI2, as all of Intel's have since 2013 and AMD's since 2017. Used only in functions that
/// are compiled for them, behind a check.
#[cfg(target_arch = "x86_64")]
pub(super) struct X86V3;

#[cfg(target_arch = "x86_64")]
impl X86V3 {
    pub(super) fn is_here() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi2")
    }
}

#[cfg(target_arch = "x86_64")]
impl Processor for X86V3 {
    type Vector = x86::__m256;

    #[inline(always)]
    fn splat(value: f32) -> Self::Vector {
        // SAFETY: see the type.
        unsafe { x86::_mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self::Vector {
        // SAFETY: see the type; a vector's worth is there.
        unsafe { x86::_mm256_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn store(vector: Self::Vector, values: &mut [f32; LANES]) {
        // SAFETY: as for `load`.
        unsafe { x86::_mm256_storeu_ps(values.as_mut_ptr(), vector) }
    }

    #[inline(always)]
    fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        // SAFETY: see the type.
        unsafe { x86::_mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn spread(codes: u64, bits: u32) -> Self::Vector {
        let mask = 0x0101_0101_0101_0101 * ((1 << bits) - 1);
        // SAFETY: see the type.
        unsafe {
            let bytes = x86::_pdep_u64(codes, mask).cast_signed();
            x86::_mm256_cvtepi32_ps(x86::_mm256_cvtepu8_epi32(x86::_mm_cvtsi64_si128(bytes)))
        }
    }

    #[inline(always)]
    fn widen(codes: [u32; 2]) -> Self::Vector {
        let bytes = u64::from(codes[0]) | (u64::from(codes[1]) << 32);
        // SAFETY: see the type.
        unsafe {
            let bytes = x86::_mm_cvtsi64_si128(bytes.cast_signed());
            x86::_mm256_cvtepi32_ps(x86::_mm256_cvtepu8_epi32(bytes))
        }
    }
}

/// Numbers that are worked on side by side: what a register holds that most processors have.
pub(super) const LANES: usize = 8;
