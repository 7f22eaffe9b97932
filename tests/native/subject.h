// What subject.c and the tests that use it agree on.
#ifndef TM_SUBJECT_H
#define TM_SUBJECT_H
#include <stdint.h>

#define SUBJECT ((char *)0x100000000000) // its region under test starts here
#define FUTEX_WAIT_OP 128                // FUTEX_WAIT_PRIVATE
#define FUTEX_WAKE_OP_ 129               // FUTEX_WAKE_PRIVATE

static inline uint64_t subject_word(uint64_t page) { return (page + 1) * 0x9e3779b97f4a7c15u; }

#endif
