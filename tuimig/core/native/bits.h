// Internal: bitmaps of pages in words of 64, set by several threads at once. A bit is set after what it tells of is done.
#ifndef TM_BITS_H
#define TM_BITS_H
#include <stdint.h>

static inline uint64_t tm_bits_words(uint64_t n) { return (n + 63) / 64; }

static inline int tm_bits_test(const uint64_t *bits, uint64_t at) {
    return (int)(__atomic_load_n(&bits[at / 64], __ATOMIC_ACQUIRE) >> (at % 64) & 1);
}

// 1: it was not set before.
static inline int tm_bits_set(uint64_t *bits, uint64_t at) {
    uint64_t bit = UINT64_C(1) << (at % 64);
    return (__atomic_fetch_or(&bits[at / 64], bit, __ATOMIC_ACQ_REL) & bit) == 0;
}

static inline void tm_bits_set_range(uint64_t *bits, uint64_t first, uint64_t n) {
    for (uint64_t at = first; at < first + n;) {
        uint64_t in_word = 64 - at % 64, left = first + n - at, take = in_word < left ? in_word : left;
        uint64_t mask = (take == 64 ? UINT64_MAX : (UINT64_C(1) << take) - 1) << (at % 64);
        __atomic_fetch_or(&bits[at / 64], mask, __ATOMIC_ACQ_REL);
        at += take;
    }
}

static inline void tm_bits_clear_range(uint64_t *bits, uint64_t first, uint64_t n) {
    for (uint64_t at = first; at < first + n;) {
        uint64_t in_word = 64 - at % 64, left = first + n - at, take = in_word < left ? in_word : left;
        uint64_t mask = (take == 64 ? UINT64_MAX : (UINT64_C(1) << take) - 1) << (at % 64);
        __atomic_fetch_and(&bits[at / 64], ~mask, __ATOMIC_SEQ_CST);
        at += take;
    }
}

// The first set bit in [at, end); end: none.
static inline uint64_t tm_bits_next(const uint64_t *bits, uint64_t at, uint64_t end) {
    while (at < end) {
        uint64_t word = __atomic_load_n(&bits[at / 64], __ATOMIC_ACQUIRE) >> (at % 64);
        if (word) {
            at += (uint64_t)__builtin_ctzll(word);
            return at < end ? at : end;
        }
        at = (at / 64 + 1) * 64;
    }
    return end;
}

// The first clear bit in [at, end); end: none.
static inline uint64_t tm_bits_next_clear(const uint64_t *bits, uint64_t at, uint64_t end) {
    while (at < end) {
        uint64_t word = ~__atomic_load_n(&bits[at / 64], __ATOMIC_ACQUIRE) >> (at % 64);
        if (word) {
            at += (uint64_t)__builtin_ctzll(word);
            return at < end ? at : end;
        }
        at = (at / 64 + 1) * 64;
    }
    return end;
}

#endif
