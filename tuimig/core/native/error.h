// One error shape for the whole engine. A call returns 0 or an enum tm_code, and fills tm_error.
// This file is also read by build.py as cffi declarations: plain C, no macros but the guard.
#ifndef TM_ERROR_H
#define TM_ERROR_H
#include <stdint.h>

enum tm_code {
    TM_OK = 0,
    TM_SYS = 1,         // a system call failed where it should not have
    TM_GONE = 2,        // the target is gone, or executes another program
    TM_PRIVILEGE = 3,   // EPERM/EACCES/ENOSYS: a privilege or kernel feature is missing
    TM_UNSUPPORTED = 4, // the target holds state that cannot be migrated
    TM_LOST = 5,        // a page of T0 was lost before it was captured
    TM_DEADLINE = 6,    // not all threads stopped in time
    TM_FULL = 7,        // no room for the captured pages
    TM_CANCELLED = 8,
    TM_DAMAGED = 9, // stored data is not what was stored
    TM_NOMEM = 10,
};

struct tm_error {
    int32_t code;     // enum tm_code
    int32_t err;      // errno, 0 where none
    int32_t tid;      // thread concerned, 0 where none
    uint64_t address; // address concerned, 0 where none
    char where[48];   // system call or step
    char what[160];   // a clause for the person
};

#endif
