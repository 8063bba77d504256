package relay

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// A Daemon is a criu-image-proxy or a criu-image-cache, by the path of its control socket. Every call is a connection of
// its own: a Daemon may be used by several goroutines.
type Daemon string

// The daemons where systemd runs them.
const (
	Proxy Daemon = "/run/criu-image/proxy/control.sock"
	Cache Daemon = "/run/criu-image/cache/control.sock"
)

const (
	interfaceName = "org.criu.ImageRelay."
	// A longer reply is taken for nonsense.
	replyMax = 16 << 20
)

// ErrNoSuchSnapshot is what a daemon says that does not know the snapshot it is asked about.
var ErrNoSuchSnapshot = errors.New("no such snapshot")

// A RefusedError is what a daemon says that does not do what it is asked for.
type RefusedError struct {
	// Reason is the daemon's, in words.
	Reason string
}

func (e *RefusedError) Error() string { return e.Reason }

// A DamagedError says that a snapshot was cut short, aborted or refused: it will never be restored.
type DamagedError struct {
	ID string
	// Reason is the daemon's, in words.
	Reason string
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("snapshot %s is damaged: %s", e.ID, e.Reason)
}

// A State says how far a snapshot has come.
type State string

// The states of a snapshot. Others may come with later daemons.
const (
	Awaited   State = "awaited"   // nothing of it has come
	Receiving State = "receiving" // images or pages are coming
	Paged     State = "paged"     // the cache holds its pages, its images are still to come
	Whole     State = "whole"     // complete and acknowledged
	Damaged   State = "damaged"   // never to be restored; Snapshot.Reason says why
	Taken     State = "taken"     // a restore has read it
)

// A Snapshot is what a daemon knows of one.
type Snapshot struct {
	ID     string `json:"id"`
	State  State  `json:"state"`
	Reason string `json:"reason"`
	// Peer is where it comes from (cache) or goes to (proxy).
	Peer   string `json:"peer"`
	Images uint64 `json:"images"`
	Bytes  uint64 `json:"bytes"`
}

// An ImageFile is an image of a snapshot as a file.
type ImageFile struct {
	Name  string `json:"name"`
	Bytes int64  `json:"bytes"`
	// Path opens it as long as the cache holds the snapshot.
	Path string `json:"path"`
}

type byID struct {
	ID string `json:"id"`
}

type openIn struct {
	ID string `json:"id"`
	To string `json:"to,omitempty"`
}

type snapshotOut struct {
	Snapshot Snapshot `json:"snapshot"`
}

// Show tells what the daemon knows of a snapshot.
func (d Daemon) Show(ctx context.Context, id string) (Snapshot, error) {
	var out snapshotOut
	err := d.call(ctx, "Show", byID{id}, nil, &out)
	return out.Snapshot, err
}

// Drop has a snapshot forgotten, and its memory given back.
func (d Daemon) Drop(ctx context.Context, id string) error {
	return d.call(ctx, "Drop", byID{id}, nil, nil)
}

// Open hands over a stream socket on which the images of a snapshot come as criu dump --stream sends them. At the proxy
// it goes to the cache at to (HOST or HOST:PORT), or to the configured one if to is empty. The caller keeps its descriptor,
// and closes it.
func (d Daemon) Open(ctx context.Context, id, to string, socket *os.File) error {
	return d.call(ctx, "Open", openIn{id, to}, socket, nil)
}

// OpenPages hands over a stream socket on which CRIU's page server protocol is spoken for a snapshot, round by round. The
// rest is as with [Daemon.Open].
func (d Daemon) OpenPages(ctx context.Context, id, to string, socket *os.File) error {
	return d.call(ctx, "OpenPages", openIn{id, to}, socket, nil)
}

// Files gives the images of a whole snapshot as files. Only a cache has them.
func (d Daemon) Files(ctx context.Context, id string) ([]ImageFile, error) {
	var out struct {
		Images []ImageFile `json:"images"`
	}
	err := d.call(ctx, "View", byID{id}, nil, &out)
	return out.Images, err
}

// WaitWhole waits until a snapshot is whole, which at the proxy means that the cache has acknowledged it. The snapshot need
// not be there yet. If it is damaged the error is a [*DamagedError].
func (d Daemon) WaitWhole(ctx context.Context, id string) (Snapshot, error) {
	conversation, err := d.begin(ctx, "Watch", byID{id}, true, nil)
	if err != nil {
		return Snapshot{}, err
	}
	defer conversation.end()
	for {
		var out snapshotOut
		more, err := conversation.reply(&out)
		if err != nil {
			return Snapshot{}, err
		}
		switch out.Snapshot.State {
		case Whole, Taken:
			return out.Snapshot, nil
		case Damaged:
			return out.Snapshot, &DamagedError{id, out.Snapshot.Reason}
		}
		if !more {
			return out.Snapshot, fmt.Errorf("snapshot %s is %s and will not become whole", id, out.Snapshot.State)
		}
	}
}

func (d Daemon) call(ctx context.Context, method string, in any, socket *os.File, out any) error {
	conversation, err := d.begin(ctx, method, in, false, socket)
	if err != nil {
		return err
	}
	defer conversation.end()
	_, err = conversation.reply(out)
	return err
}

// A conversation is one call and its replies.
type conversation struct {
	ctx        context.Context
	what       string
	connection *net.UnixConn
	replies    *bufio.Reader
	unwatch    func() bool
}

func (d Daemon) begin(ctx context.Context, method string, in any, more bool, socket *os.File) (*conversation, error) {
	call, err := json.Marshal(struct {
		Method     string `json:"method"`
		Parameters any    `json:"parameters"`
		More       bool   `json:"more,omitempty"`
	}{interfaceName + method, in, more})
	if err != nil {
		return nil, err
	}
	dialed, err := new(net.Dialer).DialContext(ctx, "unix", string(d))
	if err != nil {
		return nil, err
	}
	connection, ok := dialed.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("%s: not a unix socket", d)
	}
	c := &conversation{ctx: ctx, what: fmt.Sprintf("%s: %s", d, method), connection: connection}
	c.replies = bufio.NewReader(connection)
	// A deadline in the past wakes whoever reads or writes.
	c.unwatch = context.AfterFunc(ctx, func() { _ = connection.SetDeadline(time.Unix(1, 0)) })
	if err := sendWith(connection, append(call, 0), socket); err != nil {
		c.end()
		return nil, c.failed(err)
	}
	return c, nil
}

// reply takes the next reply, and tells whether more follow.
func (c *conversation) reply(out any) (more bool, err error) {
	message, err := c.message()
	if err != nil {
		return false, c.failed(err)
	}
	var reply struct {
		Parameters json.RawMessage `json:"parameters"`
		Continues  bool            `json:"continues"`
		Error      string          `json:"error"`
	}
	if err := json.Unmarshal(message, &reply); err != nil {
		return false, c.failed(err)
	}
	if reply.Error != "" {
		return false, c.failed(daemonError(reply.Error, reply.Parameters))
	}
	if out != nil {
		if err := json.Unmarshal(reply.Parameters, out); err != nil {
			return false, c.failed(err)
		}
	}
	return reply.Continues, nil
}

// message reads up to the NUL that ends a message.
func (c *conversation) message() ([]byte, error) {
	var message []byte
	for {
		part, err := c.replies.ReadSlice(0)
		message = append(message, part...)
		switch {
		case err == nil:
			return message[:len(message)-1], nil
		case len(message) > replyMax:
			return nil, fmt.Errorf("a reply of more than %d bytes", replyMax)
		case errors.Is(err, io.EOF):
			return nil, errors.New("the daemon closed the connection")
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

func (c *conversation) end() {
	c.unwatch()
	_ = c.connection.Close()
}

func (c *conversation) failed(err error) error {
	if c.ctx.Err() != nil {
		err = context.Cause(c.ctx)
	}
	return fmt.Errorf("%s: %w", c.what, err)
}

func daemonError(name string, parameters json.RawMessage) error {
	var said struct {
		ID     string `json:"id"`
		Reason string `json:"reason"`
	}
	// An error without parameters is known by its name alone.
	_ = json.Unmarshal(parameters, &said)
	switch name {
	case interfaceName + "NoSuchSnapshot":
		return fmt.Errorf("%w: %q", ErrNoSuchSnapshot, said.ID)
	case interfaceName + "Refused":
		return &RefusedError{said.Reason}
	default:
		return errors.New(name)
	}
}

// sendWith writes all of a message, with a descriptor along its first byte if there is one.
func sendWith(connection *net.UnixConn, message []byte, file *os.File) error {
	if file != nil {
		rights := syscall.UnixRights(int(file.Fd()))
		sent, _, err := connection.WriteMsgUnix(message, rights, nil)
		if err != nil || sent == len(message) {
			return err
		}
		message = message[sent:]
	}
	_, err := connection.Write(message)
	return err
}
