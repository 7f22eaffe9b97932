// CRC32C of a page, three interleaved streams because one crc32 instruction takes three cycles but one can start in
// each; and the test for a page that is all zero. Pure functions.
#include <immintrin.h>
#include <string.h>

#include "checksum.h"
#include "util.h"

#define LANE 1360ul                 // three lanes and 16 bytes make a page
#define SHIFT_ONE_LANE 0x3f70cc6fu  // x^(8*LANE - 33) mod the CRC32C polynomial, reflected
#define SHIFT_TWO_LANES 0x5aa1f3cfu // x^(16*LANE - 33)

static inline uint64_t load(const unsigned char *at) {
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

// The checksum `crc` after as many zero bytes as `factor` stands for.
__attribute__((target("sse4.2,pclmul"))) static inline uint64_t shift(uint64_t crc, uint32_t factor) {
    __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)crc), _mm_cvtsi64_si128((long long)factor), 0);
    return _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

__attribute__((target("sse4.2,pclmul"))) uint32_t tm_crc32c_page(const void *page) {
    const unsigned char *at = page;
    uint64_t a = 0xffffffffu, b = 0, c = 0;
    for (unsigned long i = 0; i < LANE; i += 8) {
        a = _mm_crc32_u64(a, load(at + i));
        b = _mm_crc32_u64(b, load(at + LANE + i));
        c = _mm_crc32_u64(c, load(at + 2 * LANE + i));
    }
    c ^= shift(a, SHIFT_TWO_LANES) ^ shift(b, SHIFT_ONE_LANE);
    c = _mm_crc32_u64(c, load(at + 3 * LANE));
    c = _mm_crc32_u64(c, load(at + 3 * LANE + 8));
    return (uint32_t)c ^ 0xffffffffu;
}

int tm_page_is_zero(const void *page) {
    const unsigned char *at = page;
    for (unsigned long i = 0; i < TM_PAGE_SIZE; i += 64) {
        uint64_t any = 0;
        for (unsigned long j = 0; j < 64; j += 8) {
            any |= load(at + i + j);
        }
        if (any) {
            return 0;
        }
    }
    return 1;
}
