// See held.h.
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "harness.h"
#include "held.h"

enum { PATIENCE = 8 };

// A process between: what traces a child of its own would also reap it, and its status with it.
static void keep(const char *program, const char *mode, const char *number, int in, int out, int tell) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(in, 0);
        dup2(out, 1);
        execl(program, "subject", mode, number, NULL);
        _exit(98);
    }
    int status = 0;
    if (write(tell, &pid, sizeof pid) != sizeof pid) _exit(1);
    close(in);
    close(out);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    _exit(write(tell, &status, sizeof status) != sizeof status);
}

void held_start(struct held *held, const char *mode, uint64_t n, uint64_t pages) {
    memset(held, 0, sizeof *held);
    const char *program = getenv("SUBJECT");
    CHECK(program, "SUBJECT names the program to hold; run.sh builds it");
    int in[2], out[2];
    CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0, "pipe");
    char number[32];
    snprintf(number, sizeof number, "%llu", (unsigned long long)n);
    fflush(NULL);
    int told[2];
    CHECK(pipe2(told, O_CLOEXEC) == 0, "pipe");
    held->keeper = fork();
    CHECK(held->keeper >= 0, "fork");
    if (held->keeper == 0) keep(program, mode, number, in[0], out[1], told[1]);
    close(in[0]);
    close(out[1]);
    close(told[1]);
    held->told = told[0];
    CHECK(read(held->told, &held->pid, sizeof held->pid) == sizeof held->pid, "the keeper did not start");
    held->to = in[1];
    held->from = out[0];
    char byte = 0;
    CHECK(read(held->from, &byte, 1) == 1 && byte == 'r', "%s did not start", mode);
    held->pidfd = (int)syscall(SYS_pidfd_open, held->pid, 0);
    CHECK(held->pidfd >= 0, "pidfd_open");
    held->dev_fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    held->pages_fd = -1;
    held->range = (struct tm_range){(uint64_t)SUBJECT, (uint64_t)SUBJECT + pages * PAGE, TM_PROTECTED, 0};
    held->plan = (struct tm_freeze_plan){
        .ranges = &held->range,
        .n_ranges = pages ? 1 : 0,
        .eager_below = UINT64_MAX,
        .class_treatment = {TM_EAGER, TM_EAGER, TM_EAGER},
        .deadline_us = 2000000,
    };
}

static void spool_close(struct held *held) {
    if (held->pages_fd < 0) return;
    tm_spool_destroy(held->spool);
    close(held->pages_fd);
    held->spool = NULL;
    held->pages_fd = -1;
}

static int freeze_once(struct held *held, int how) {
    if (!held->source) CHECK_OK(tm_source_create(held->pid, held->pidfd, &held->source, why));
    spool_close(held);
    held->pages_fd = (int)syscall(SYS_memfd_create, "spool", MFD_CLOEXEC);
    CHECK_OK(tm_spool_create(held->pages_fd, 0, 1, &held->spool, why));
    held->plan.spool = held->spool;
    held->plan.guarded = how & GUARDED ? 1 : 0;
    held->plan.verify = how & VERIFY ? 1 : 0;
    int code = tm_source_attach(held->source, held->dev_fd, TM_TRACK_NONE, &(int32_t){0}, &held->error);
    if (!code) code = tm_source_freeze(held->source, &held->plan, &held->error);
    return code;
}

// A thread that waits for a CPU for too long is in the way only for a moment.
int held_freeze(struct held *held, int how) {
    int code = TM_DEADLINE;
    for (int i = 0; code == TM_DEADLINE && i < PATIENCE; i++) code = freeze_once(held, how);
    return code;
}

int held_end(struct held *held, int how) {
    struct tm_source_progress progress = {0};
    int code = 0;
    for (int i = 0; i < 2000 && !code && progress.state != TM_CAPTURED; i++) {
        code = tm_source_wait(held->source, 50, &held->error);
        tm_source_progress(held->source, &progress);
    }
    CHECK(code || progress.state == TM_CAPTURED, "the capture does not end: %llu of %llu pages",
          (unsigned long long)progress.pages_done, (unsigned long long)progress.pages_total);
    int end = tm_source_end(held->source, &held->error);
    if (!code) code = end;
    if (!code && how & VERIFY) code = tm_source_verify(held->source, &held->error);
    return code;
}

int held_capture(struct held *held, int how) {
    int code = held_freeze(held, how);
    return code ? code : held_end(held, how);
}

void held_do(struct held *held, char command) { CHECK(write(held->to, &command, 1) == 1, "it is gone"); }

int held_well(struct held *held) {
    held_do(held, 'c');
    char byte = 0;
    return read(held->from, &byte, 1) == 1 && byte == '.';
}

void held_page(struct held *held, uint64_t address, uint64_t *words) {
    const struct tm_region_state *regions;
    uint32_t n = tm_source_regions(held->source, &regions);
    uint32_t low = 0;
    for (uint32_t high = n; low < high;) { // the first that ends after it
        uint32_t middle = (low + high) / 2;
        if (regions[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    CHECK(low < n && regions[low].start <= address, "%lx lies in no region", (unsigned long)address);
    const struct tm_region_state *region = &regions[low];
    CHECK(region->slot != UINT64_MAX, "region %lx has no slot", (unsigned long)region->start);
    CHECK_OK(tm_spool_get(held->spool, (region->slot + (address - region->start)) / PAGE, words, 1, why));
}

static void all_free(struct held *held) {
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/%d/task", held->pid);
    DIR *dir = opendir(path);
    CHECK(dir, "%s", path);
    for (struct dirent *entry; (entry = readdir(dir));) {
        char status[400];
        if (entry->d_name[0] == '.') continue;
        snprintf(status, sizeof status, "%s/%s/status", path, entry->d_name);
        FILE *file = fopen(status, "re");
        while (file && fgets(line, sizeof line, file)) {
            CHECK(strncmp(line, "TracerPid:", 10) || atoi(line + 10) == 0, "thread %s is traced", entry->d_name);
            CHECK(strncmp(line, "State:\tt", 8), "thread %s is left stopped", entry->d_name);
        }
        if (file) fclose(file);
    }
    closedir(dir);
    snprintf(path, sizeof path, "/proc/%d/smaps", held->pid);
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, "VmFlags:", 8)) CHECK(!strstr(line, " uw"), "a region is left registered");
    if (file) fclose(file);
    snprintf(path, sizeof path, "/proc/%d/fd", held->pid);
    dir = opendir(path);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        char name[400], link[64] = {0};
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        if (readlink(name, link, sizeof link - 1) > 0) CHECK(!strstr(link, "userfault"), "it keeps a descriptor");
    }
    if (dir) closedir(dir);
}

void held_let_go(struct held *held) {
    if (held->source) tm_source_destroy(held->source);
    held->source = NULL;
    spool_close(held);
    if (kill(held->pid, 0) == 0) all_free(held);
}

int held_finish(struct held *held) {
    if (held->source) held_let_go(held);
    if (write(held->to, "q", 1) < 0) errno = 0; // it may have ended on its own
    int status = 0;
    CHECK(read(held->told, &status, sizeof status) == sizeof status, "its end was not told");
    CHECK(waitpid(held->keeper, NULL, 0) == held->keeper, "waitpid");
    close(held->told);
    close(held->to);
    close(held->from);
    close(held->pidfd);
    if (held->dev_fd >= 0) close(held->dev_fd);
    return status;
}

static int smaps_line(struct held *held, uint64_t address, const char *field, char *line, int size) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/smaps", held->pid);
    FILE *file = fopen(path, "re");
    CHECK(file, "%s", path);
    int inside = 0, found = 0;
    while (!found && fgets(line, size, file)) {
        unsigned long start, end;
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2) inside = address >= start && address < end;
        found = inside && !strncmp(line, field, strlen(field));
    }
    fclose(file);
    return found;
}

uint64_t held_smaps(struct held *held, uint64_t address, const char *field) {
    char line[256];
    CHECK(smaps_line(held, address, field, line, sizeof line), "no %s at %lx", field, (unsigned long)address);
    return strtoull(line + strlen(field), NULL, 10);
}

int held_flag(struct held *held, uint64_t address, const char *flag) {
    char line[512];
    CHECK(smaps_line(held, address, "VmFlags:", line, sizeof line), "no flags at %lx", (unsigned long)address);
    return strstr(line, flag) != NULL;
}
