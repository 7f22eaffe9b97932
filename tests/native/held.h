// A subject (subject.c) in the hands of the source side: started, frozen, captured, looked at afterwards.
#ifndef TM_HELD_H
#define TM_HELD_H
#include "source.h"
#include "subject.h"

#define PAGE 4096ul

enum { OPTIMISTIC = 0, GUARDED = 1, VERIFY = 2, NO_WAIT = 4 };

struct held {
    pid_t pid;
    pid_t keeper; // its parent
    int told;     // the keeper tells its status here
    int pidfd;
    int to, from; // its standard input and output
    int pages_fd;
    int dev_fd;
    struct tm_source *source;
    struct tm_spool *spool;
    struct tm_range range;
    struct tm_freeze_plan plan;
    struct tm_error error;
};

// `pages`: size of the region to protect, 0: nothing is. Everything else is eager.
void held_start(struct held *held, const char *mode, uint64_t n, uint64_t pages);
int held_freeze(struct held *held, int how);  // attach and freeze; the code
int held_end(struct held *held, int how);     // wait, end, verify; the code
int held_capture(struct held *held, int how); // both
void held_do(struct held *held, char command);
int held_well(struct held *held);                                     // its own answer
void held_page(struct held *held, uint64_t address, uint64_t *words); // as captured: 512 words
void held_let_go(struct held *held); // the source is destroyed; nothing of it may be left
int held_finish(struct held *held);  // ends the subject; its wait status
uint64_t held_smaps(struct held *held, uint64_t address, const char *field); // kB, of the region there
int held_flag(struct held *held, uint64_t address, const char *flag);        // of its VmFlags

#endif
